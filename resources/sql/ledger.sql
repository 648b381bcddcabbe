-- What each target has and is owed. Parameters are psycopg's; ids are change ids unless they are called otherwise.

-- name: unregistered
select wanted.target
from unnest(%(targets)s::text[]) as wanted (target)
where not exists (select from distributary.target_state s where s.target = wanted.target)

-- name: register_from_beginning
insert into distributary.target_state (target) values (%(target)s) on conflict do nothing

-- name: register_from_now
-- What is committed is left out; what is still open is not: it will appear in a gap, and be delivered. Nor is what is
-- addressed to this target: that was meant for it.
insert into distributary.target_state (target, settled, before_start)
select %(target)s,
       coalesce(range_agg(int8range(change_id, change_id, '[]')), '{}'),
       count(*) filter (where l.target is null)
from distributary.change_log l
where l.target is distinct from %(target)s
on conflict do nothing

-- name: register_from_snapshot
-- As from now; and in the same transaction its tables' rows are asked for.
with registered as (
    insert into distributary.target_state (target, settled, before_start)
    select %(target)s,
           coalesce(range_agg(int8range(change_id, change_id, '[]')), '{}'),
           count(*) filter (where l.target is null)
    from distributary.change_log l
    where l.target is distinct from %(target)s
    on conflict do nothing
    returning target
)
insert into distributary.load (target, stream)
select target, stream from registered cross join unnest(%(streams)s::text[]) as stream

-- name: try_lock
-- A session lock, on the connection that writes: a crash frees it, and who lost the connection cannot write.
select pg_try_advisory_lock(1684632436, target_id) from distributary.target_state where target = %(target)s

-- name: unlock
select pg_advisory_unlock(1684632436, target_id) from distributary.target_state where target = %(target)s

-- name: read_by_index
-- For this session. Without statistics (a new log, a first load) the planner sorts all of the log for each window; and
-- where it takes such a plan it also compiles it, which takes longer than running it. By hash, no part of a window would
-- come before all of it is gathered. A window of usual records is to be sorted in memory: in order already, that is next
-- to nothing, and by way of the disk most of what reading it takes. What is looked up by an id is looked up once: to
-- remember it pays for nothing. And what is prepared has one plan, the best for small limits: with a long log behind it the
-- planner would think up a better one for each window, and take longer over it than the window takes.
select set_config(name, 'off', false)
from unnest(array['enable_seqscan', 'enable_bitmapscan', 'enable_hashagg', 'enable_memoize', 'jit']) as name
union all
select set_config('plan_cache_mode', 'force_generic_plan', false)
union all
select set_config('work_mem', '16MB', false)
where pg_size_bytes(current_setting('work_mem')) < pg_size_bytes('16MB')

-- name: still_connected
select %(target)s::text

-- name: log_identity
select log_id from distributary.log_identity

-- name: state
select i.log_id, s.status, s.reason, s.failed_runs, s.retry_at
from distributary.target_state s, distributary.log_identity i
where s.target = %(target)s

-- name: last_leftover
select max(batch_id) from distributary.batch where target = %(target)s and state = 'claimed'

-- name: leftovers
-- The parts of a batch come where it came, in the order of its members, which is that of their ids.
with found as materialized (
    select coalesce(b.part_of, b.batch_id) as origin, b.change_ids[1] as first, b.batch_id, b.lane, b.stream,
           b.operation, b.idempotency_key, b.set_aside, m.change_ids
    from distributary.batch b
    join distributary.target_state s on s.target = b.target
    cross join lateral (
        select array_agg(id order by position) as change_ids
        from unnest(b.change_ids) with ordinality as member (id, position)
        where s.claimed @> id
    ) m
    where b.target = %(target)s and b.state = 'claimed' and b.batch_id <= %(up_to)s and m.change_ids is not null
      and (coalesce(b.part_of, b.batch_id), b.change_ids[1], b.batch_id)
          > (%(origin)s::bigint, %(first)s::bigint, %(batch_id)s::bigint)
    order by origin, first, batch_id
    limit %(max_records)s
),
few as (
    select f.*, sum(cardinality(change_ids)) over (order by origin, first, batch_id) as records from found f
)
select r.origin, r.first, r.batch_id, r.lane, r.stream, r.batch_operation, r.idempotency_key, r.set_aside,
       r.change_id, r.record_stream, r.key, r.operation, convert_to(r.payload::text, 'UTF8'), r.changed_at, r.replays
from (
    -- Sums over batches, not records: the records of one are peers.
    select f.origin, f.first, f.batch_id, f.lane, f.stream, f.operation as batch_operation, f.idempotency_key,
           f.set_aside, member.position,
           c.change_id, c.stream as record_stream, c.key, c.operation, c.payload, c.changed_at, c.replays,
           sum(pg_column_size(c.payload)) over (order by f.origin, f.first, f.batch_id) as bytes,
           dense_rank() over (order by f.origin, f.first, f.batch_id) as place
    from few f
    cross join lateral unnest(f.change_ids) with ordinality as member (change_id, position)
    join distributary.change_log c on c.change_id = member.change_id
    where f.records <= %(max_records)s or f.records = cardinality(f.change_ids)
) r
where r.bytes <= %(max_bytes)s or r.place = 1
order by r.origin, r.first, r.batch_id, r.position

-- name: blocked
select d.stream, d.key, min(d.change_id)
from unnest(%(streams)s::text[], %(record_keys)s::text[]) as k (stream, key)
join distributary.dead_letter d
  on d.target = %(target)s and d.stream = k.stream and d.key = k.key and d.state = 'open'
  and hashtextextended(d.key, 0) = hashtextextended(k.key, 0)  -- as it is indexed: a key may be too long for that
group by d.stream, d.key

-- name: decided
-- Asked before `pending`: what was decided at this instant is seen by every later snapshot.
select -- A fence in the future was taken in another cluster, before a dump and a restore: it is none.
       coalesce(fence_xid < pg_snapshot_xmax(pg_current_snapshot()), false) as fenced,
       case when fence_xid < pg_snapshot_xmin(pg_current_snapshot()) then fence_change_id end as decided
from distributary.target_state
where target = %(target)s

-- name: pending
-- In the order of the ids, column by column, the changes of a few ids at a time: whoever has enough bytes can stop, and
-- nobody takes a row apart. No JSON text holds U+0001 (RFC 8259: no blank by §2, escaped by §7), and a long text is sent
-- in less time than an array of short ones. The holes below what is settled or claimed are few, and are sorted; the log
-- behind all that is read as it lies.
select array_agg(p.change_id), array_agg(p.stream), array_agg(p.key), string_agg(p.operation, ','),
       convert_to(string_agg(p.payload::text, E'\x01'), 'UTF8'), array_agg(p.changed_at), array_agg(p.replays)
from (
    (
        select l.*
        from distributary.target_state s
        cross join lateral unnest(
            int8multirange(int8range(0, coalesce(upper(s.settled + s.claimed), 0))) - (s.settled + s.claimed)
        ) as hole
        cross join lateral (
            select l.change_id, l.stream, l.key, l.operation, l.payload, l.changed_at, l.replays
            from distributary.change_log l
            where l.change_id >= lower(hole)
              and l.change_id < upper(hole)
              and (l.target is null or l.target = %(target)s)
            order by l.change_id
            limit %(max_records)s
        ) l
        where s.target = %(target)s
        order by l.change_id
        limit %(max_records)s
    )
    union all
    (
        select l.change_id, l.stream, l.key, l.operation, l.payload, l.changed_at, l.replays
        from distributary.change_log l
        where l.change_id >= (
                select coalesce(upper(s.settled + s.claimed), 0)
                from distributary.target_state s
                where s.target = %(target)s
            )
          and (l.target is null or l.target = %(target)s)
        order by l.change_id
        limit %(max_records)s
    )
    order by change_id
    limit %(max_records)s
) p
group by p.change_id / %(ids_at_once)s::bigint
order by p.change_id / %(ids_at_once)s::bigint

-- name: pending_in_a_row
-- What `pending` gives, without a sort, where nearly every id is one of them: first it is found where the parts begin,
-- each at a change, then they are gathered one by one as the index gives them. A part is of so many ids, and may be of
-- fewer changes: so it is said if there is `more` behind. Nothing, if any of it is in a hole: that would have to go before.
with recursive part as (
    select null::bigint as first,
           null::bigint as behind,
           %(max_records)s::bigint as room,
           (
               select l.change_id
               from distributary.change_log l
               where l.change_id >= coalesce(upper(s.had), 0)
                 and (l.target is null or l.target = %(target)s)
               order by l.change_id
               limit 1
           ) as next
    from (select settled + claimed as had from distributary.target_state where target = %(target)s offset 0) s
    where not exists (
        select
        from unnest(int8multirange(int8range(0, coalesce(upper(s.had), 0))) - s.had) as hole
        cross join lateral (
            select
            from distributary.change_log l
            where l.change_id >= lower(hole)
              and l.change_id < upper(hole)
              and (l.target is null or l.target = %(target)s)
            order by l.change_id
            limit 1
        ) l
    )
    union all
    select p.next,
           p.next + least(p.room, %(ids_at_once)s),
           p.room - %(ids_at_once)s,
           (
               select l.change_id
               from distributary.change_log l
               where l.change_id >= p.next + least(p.room, %(ids_at_once)s)
                 and (l.target is null or l.target = %(target)s)
               order by l.change_id
               limit 1
           )
    from part p
    where p.room > 0 and p.next is not null
)
select p.first,
       cardinality(l.ids) as number,
       case when cardinality(l.ids) <= l.ids[cardinality(l.ids)] - p.first then l.ids end as ids,  -- where some are missing
       l.keys, l.payloads, l.instants,
       f.stream, l.ids_of_streams, l.streams, f.operation, l.ids_of_operations, l.operations, l.ids_of_replays, l.replays,
       p.next is not null as more
from (select * from part where first is not null order by first) p
cross join lateral (
    select f.stream, f.operation from distributary.change_log f where f.change_id = p.first limit 1
) f
cross join lateral (
    -- Of what is nearly always the same, those that differ from the first.
    select array_agg(l.change_id) as ids,
           string_agg(l.key, E'\x01') as keys,
           convert_to(string_agg(l.payload::text, E'\x01'), 'UTF8') as payloads,
           array_agg(l.changed_at) as instants,
           array_agg(l.change_id) filter (where l.stream <> f.stream) as ids_of_streams,
           array_agg(l.stream) filter (where l.stream <> f.stream) as streams,
           array_agg(l.change_id) filter (where l.operation <> f.operation) as ids_of_operations,
           array_agg(l.operation) filter (where l.operation <> f.operation) as operations,
           array_agg(l.change_id) filter (where l.replays is not null) as ids_of_replays,
           array_agg(l.replays) filter (where l.replays is not null) as replays
    from (
        select l.change_id, l.stream, l.key, l.operation, l.payload, l.changed_at, l.replays
        from distributary.change_log l
        where l.change_id >= p.first
          and l.change_id < p.behind
          and (l.target is null or l.target = %(target)s)
        order by l.change_id
    ) l
) l
order by p.first

-- name: last_change_id
-- The last id that was drawn, by whomever, seen or not; null if none was.
select case when is_called then last_value end from distributary.change_log_change_id_seq

-- name: set_fence
-- After `last_change_id` was read, in a transaction of its own: every transaction that drew an id up to it has an older
-- xid than this one, for the log's first column makes the xid before the id is drawn. Only if there is a gap to close;
-- what was just read is about to be claimed and is none.
update distributary.target_state
set fence_xid = pg_current_xact_id(), fence_change_id = %(last)s
where target = %(target)s
  and coalesce(fence_xid >= pg_snapshot_xmax(pg_current_snapshot()), true)
  and not (
      settled + claimed
      + %(read)s::int8multirange
      @> int8range(0, %(last)s, '[]')
  )

-- name: claim
-- One statement, so that it can be a transaction of its own: no batch is written unless the target takes what is in it.
with taken as (
    update distributary.target_state t
    set claimed = t.claimed + %(claimed)s::int8multirange,
        settled = t.settled + %(settled)s::int8multirange
                  + case when %(decided)s::bigint is null then '{}'::int8multirange
                         else int8multirange(int8range(0, %(decided)s::bigint, '[]'))
                              - t.claimed - %(claimed)s::int8multirange end,
        superseded = t.superseded + %(superseded)s,
        filtered = t.filtered + %(filtered)s,
        dead = t.dead + %(dead)s,
        fence_xid = case when %(decided)s::bigint is null then fence_xid end,
        fence_change_id = case when %(decided)s::bigint is null then fence_change_id end,
        updated_at = clock_timestamp()
    where t.target = %(target)s
      and not (t.settled && %(claimed)s::int8multirange or t.settled && %(settled)s::int8multirange
               or t.claimed && %(claimed)s::int8multirange or t.claimed && %(settled)s::int8multirange)
    returning t.target
),
written as (
    insert into distributary.batch (target, lane, stream, operation, change_ids, idempotency_key, run_id)
    select t.target, c.lane, (%(streams)s::text[])[c.stream], (%(operations)s::text[])[c.operation],
           (%(members)s::bigint[])[c.first:c.last], c.key, %(run_id)s
    from taken t
    cross join unnest(%(lanes)s::int[], %(stream_each)s::int[], %(operation_each)s::int[], %(firsts)s::int[],
                      %(lasts)s::int[], %(keys)s::uuid[])
         with ordinality as c (lane, stream, operation, first, last, key, position)
    order by c.position
    returning batch_id
)
select coalesce((select array_agg(batch_id order by batch_id) from written), '{}') from taken

-- name: split
-- Only if the parts hold just what is still claimed of the whole: what is in no batch would never be sent again.
with parts as (
    select p.*
    from unnest(%(operations)s::text[], %(firsts)s::int[], %(lasts)s::int[], %(keys)s::uuid[])
         with ordinality as p (operation, first, last, key, position)
),
whole as (
    update distributary.batch b
    set state = 'split', finished_at = clock_timestamp()
    from distributary.target_state t
    where b.batch_id = %(batch_id)s and b.target = %(target)s and b.state = 'claimed' and t.target = b.target
      and (select array_agg(id order by id) from unnest(b.change_ids) as id where t.claimed @> id)
          = (select array_agg(id order by id) from unnest(%(members)s::bigint[]) as id)
    returning b.*
),
written as (
    insert into distributary.batch
        (target, lane, stream, operation, change_ids, idempotency_key, run_id, part_of)
    select w.target, w.lane, w.stream, p.operation, (%(members)s::bigint[])[p.first:p.last], p.key, %(run_id)s,
           coalesce(w.part_of, w.batch_id)
    from whole w
    cross join parts p
    order by p.position
    returning batch_id
)
select array_agg(batch_id order by batch_id) from written

-- name: settle
-- One statement, as `claim`. A batch does not end while a member is claimed: one that is not in flight is never sent
-- again. If as many members are decided at once as there are, none is. (Said twice, for to set both columns from one
-- subquery takes longer.)
with taken as (
    update distributary.target_state t
    set settled = t.settled + %(settled)s::int8multirange,
        claimed = t.claimed - %(settled)s::int8multirange,
        accepted = t.accepted + %(accepted)s,
        filtered = t.filtered + %(filtered)s,
        dead = t.dead + %(dead)s,
        updated_at = clock_timestamp()
    where t.target = %(target)s and t.claimed @> %(settled)s::int8multirange
    returning t.claimed
),
written as (
    update distributary.batch b
    set state = case when b.state = 'claimed'
                      and (r.decided = cardinality(b.change_ids)
                           or not exists (select from unnest(b.change_ids) as id where t.claimed @> id))
                     then 'settled' else b.state end,
        finished_at = case when b.state = 'claimed'
                            and (r.decided = cardinality(b.change_ids)
                                 or not exists (select from unnest(b.change_ids) as id where t.claimed @> id))
                           then clock_timestamp() else b.finished_at end,
        accepted = b.accepted + r.accepted,
        dead = b.dead + r.dead,
        set_aside = b.set_aside + r.set_aside::int,
        attempts = b.attempts + r.attempts,
        status_code = coalesce(r.status_code, b.status_code),
        latency_ms = coalesce(r.latency_ms, b.latency_ms),
        error = coalesce(r.error, b.error)
    from taken t
    cross join unnest(%(batch_ids)s::bigint[], %(set_aside)s::bool[], %(decided_each)s::int[], %(accepted_each)s::int[],
                      %(dead_each)s::int[], %(attempts)s::int[], %(statuses)s::int[], %(latencies)s::real[],
                      %(errors)s::text[])
         as r (batch_id, set_aside, decided, accepted, dead, attempts, status_code, latency_ms, error)
    where b.batch_id = r.batch_id and b.target = %(target)s
)
select from taken

-- name: bury
insert into distributary.dead_letter
    (target, change_id, stream, key, operation, reason, status_code, response, attempts, blocked_by, run_id)
select %(target)s, d.change_id, d.stream, d.key, d.operation, d.reason, d.status_code, d.response, d.attempts,
       d.blocked_by, %(run_id)s
from unnest(%(change_ids)s::bigint[], %(streams)s::text[], %(record_keys)s::text[], %(operations)s::text[],
            %(reasons)s::text[], %(statuses)s::int[], %(responses)s::text[], %(attempts)s::int[],
            %(blocked_by)s::bigint[])
     as d (change_id, stream, key, operation, reason, status_code, response, attempts, blocked_by)

-- name: supersede
-- What was accepted is newer than what was refused before it. Found one by one by the index, whatever the planner thinks that
-- there is: on a table that was never analyzed it compared every key with every other.
update distributary.dead_letter d
set state = 'superseded', updated_at = clock_timestamp()
where d.target = %(target)s
  and d.change_id = any (array(
      select o.change_id
      from unnest(%(change_ids)s::bigint[], %(streams)s::text[], %(record_keys)s::text[]) as a (change_id, stream, key)
      cross join lateral (
          select o.change_id
          from distributary.dead_letter o
          where o.target = %(target)s and o.stream = a.stream and o.key = a.key and o.state = 'open'
            and hashtextextended(o.key, 0) = hashtextextended(a.key, 0)
            and o.change_id < a.change_id
          offset 0
      ) o
  ))

-- name: hold
update distributary.target_state
set status = %(status)s, reason = %(reason)s, failed_runs = %(failed_runs)s,
    retry_at = clock_timestamp() + make_interval(secs => %(retry_in)s::float8),
    updated_at = clock_timestamp()
where target = %(target)s

-- name: resume
update distributary.target_state
set status = 'active', reason = null, failed_runs = 0, retry_at = null, updated_at = clock_timestamp()
where target = %(target)s

-- name: owed
-- One query for all targets: a lock held is a drain at work. For each it is looked at no more than a change that is for
-- it, or than a long tail: what lies in the gaps and is nobody's here (other streams, other targets) would else be passed
-- over again at every tick.
with wanted as (
    select w.target, array(select jsonb_array_elements_text(w.streams)) as streams
    from jsonb_each(%(streams)s::jsonb) as w (target, streams)
),
held as materialized (
    select k.objid::bigint as target_id
    from pg_locks k
    where k.locktype = 'advisory' and k.granted and k.objsubid = 2
      and k.database = (select oid from pg_database where datname = current_database())
      and k.classid::bigint = 1684632436
)
select s.target,
       not isempty(s.claimed) or p.pending as has_work,
       s.target_id in (select h.target_id from held h) as held,
       s.status,
       s.reason,
       case
           when s.retry_at is null then s.status = 'paused'
           -- Only what was set aside waits: what is pending does not.
           when s.status = 'active' and s.failed_runs = 0 and p.pending then false
           else s.retry_at > clock_timestamp()
       end as waiting
from distributary.target_state s
join wanted w on w.target = s.target
cross join lateral (
    select exists (select from distributary.load d where d.target = s.target and d.state = 'running')
           or exists (
               select
               from (
                   select (l.target is null or l.target = s.target) and l.stream = any (w.streams) as wanted,
                          row_number() over () as place
                   from unnest(int8multirange(int8range(0, null)) - (s.settled + s.claimed)) as gap
                   cross join lateral (
                       select l.target, l.stream
                       from distributary.change_log l
                       where l.change_id >= lower(gap) and l.change_id < coalesce(upper(gap), 9223372036854775807)
                       order by l.change_id
                       limit %(long_tail)s
                   ) l
               ) tail
               where tail.wanted or tail.place >= %(long_tail)s
           ) as pending
    offset 0 -- else it would be worked out wherever it is named
) p
order by s.target

-- name: conservation
-- The sets are worked out once: as they are stored they would be unpacked, and added up, for each change of the log.
with state as materialized (
    select target, pruned, before_start, accepted, superseded, filtered, dead,
           claimed + '{}'::int8multirange as claimed,
           int8multirange(int8range(0, null)) - (settled + claimed) as gaps
    from distributary.target_state
    where target = %(target)s
)
select c.captured + s.pruned - s.before_start as captured,
       s.accepted, s.superseded, s.filtered, s.dead, c.claimed, c.pending
from state s
cross join lateral (
    select count(*) as captured,
           count(*) filter (where s.claimed @> l.change_id) as claimed,
           count(*) filter (where s.gaps @> l.change_id) as pending
    from distributary.change_log l
    where l.target is null or l.target = s.target
) c
