-- Loads: rows appended to the log for one target.

-- name: begin
-- A load that is running goes on where it is; one that is done begins again only if it is asked to.
insert into distributary.load (target, stream)
select %(target)s, stream from unnest(%(streams)s::text[]) as stream
on conflict (target, stream) do update
set position = null, rows = 0, state = 'running', finished_at = null,
    started_at = clock_timestamp(), updated_at = clock_timestamp()
where load.state = 'done' and %(again)s
returning stream

-- name: loads
select l.target, l.stream, l.rows, l.state = 'done', l.finished_at
from distributary.load l
where l.target = any(%(targets)s)
order by l.target, l.stream

-- name: try_lock
-- Whoever has it, for a session, has the load. A lock of the row would need a transaction as long as the load.
select pg_try_advisory_lock(hashtextextended('distributary load ' || %(target)s || '/' || %(stream)s, 0))

-- name: place
select l.position, l.rows
from distributary.load l
where l.target = %(target)s and l.stream = %(stream)s and l.state = 'running'

-- name: advance
update distributary.load
set position = %(position)s, rows = rows + %(rows)s, run_id = %(run_id)s, updated_at = clock_timestamp(),
    state = case when %(position)s::text[] is null then 'done' else 'running' end,
    finished_at = case when %(position)s::text[] is null then clock_timestamp() end
where target = %(target)s and stream = %(stream)s and state = 'running' and position is not distinct from %(place)s::text[]

-- name: estimate
-- What the planner believes; of a partitioned table the sum of its parts. -1 is 'never looked'.
select sum(greatest(c.reltuples, 0))::bigint
from pg_class c
where c.oid = any(array[%(relation)s::oid] || %(leaves)s::oid[]) and c.relkind = 'r'
