-- Backfills: what changed on some days, appended to the log once more for one target.

-- name: try_lock
-- Whoever has it, for a session, has the backfills of this target and stream.
select pg_try_advisory_lock(hashtextextended('distributary backfill ' || %(target)s || '/' || %(stream)s, 0))

-- name: begin
-- One that is running goes on where it is; one that is done begins anew.
insert into distributary.backfill as b (target, stream, since, until)
values (%(target)s, %(stream)s, %(since)s, %(until)s)
on conflict (target, stream, since, until) do update
set position = case when b.state = 'running' then b.position end,
    appended = case when b.state = 'running' then b.appended else 0 end,
    by_day = case when b.state = 'running' then b.by_day else '{}' end,
    started_at = case when b.state = 'running' then b.started_at else clock_timestamp() end,
    state = 'running', updated_at = clock_timestamp()
returning position, appended, by_day

-- name: keys
-- Each with its last change then, and the day of it.
select l.key collate "C" as key, max(l.change_id) as latest, (max(l.changed_at) at time zone 'UTC')::date
from distributary.change_log l
where l.stream = %(stream)s and l.changed_at >= %(since)s and l.changed_at < %(until)s
  and (l.target is null or l.target = %(target)s)
  and l.key collate "C" > coalesce(%(position)s::text, '')
group by l.key collate "C"
order by l.key collate "C"

-- name: payloads
select l.key, l.payload from distributary.change_log l where l.change_id = any(%(change_ids)s)

-- name: events
select l.change_id, (l.changed_at at time zone 'UTC')::date
from distributary.change_log l
where l.stream = %(stream)s and l.changed_at >= %(since)s and l.changed_at < %(until)s
  and (l.target is null or l.target = %(target)s) and l.replays is null
  and l.change_id > coalesce(%(position)s::text::bigint, 0)
order by l.change_id

-- name: advance
update distributary.backfill
set position = %(position)s, appended = %(appended)s, by_day = %(by_day)s, run_id = %(run_id)s,
    updated_at = clock_timestamp()
where target = %(target)s and stream = %(stream)s and since = %(since)s and until = %(until)s and state = 'running'

-- name: finish
update distributary.backfill
set state = 'done', run_id = %(run_id)s, updated_at = clock_timestamp()
where target = %(target)s and stream = %(stream)s and since = %(since)s and until = %(until)s

-- name: kept_since
-- The first thousand stand for the oldest: the order of the log is nearly that of time.
select min(l.changed_at)
from (select changed_at from distributary.change_log order by change_id limit 1000) l
where exists (select from distributary.target_state where pruned > 0)
