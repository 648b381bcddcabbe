-- Dead letters: what is open, and what becomes of it.

-- name: groups
select d.target, d.stream, d.reason, count(*), min(d.died_at), max(d.died_at),
       (array_agg(d.key order by d.change_id))[1:5]
from distributary.dead_letter d
where {selected}
group by d.target, d.stream, d.reason
order by d.target, d.stream, count(*) desc, d.reason

-- name: next_keys
-- Keys, not letters: of a key all that is meant goes at once, and in order.
select d.key
from distributary.dead_letter d
where {selected} and d.target = %(target)s and d.stream = %(stream)s
  and (%(after)s::text is null or d.key > %(after)s)
group by d.key
order by d.key
limit %(limit)s

-- name: close_keys
-- Of the letters of some keys, those that are meant; or with 'whole' all that are open.
update distributary.dead_letter d
set state = 'redriven', updated_at = clock_timestamp(), run_id_closed = %(run_id)s
where d.target = %(target)s and d.stream = %(stream)s and d.key = any(%(key_list)s) and d.state = 'open'
  and hashtextextended(d.key, 0) = any(array(select hashtextextended(k, 0) from unnest(%(key_list)s::text[]) as k))
  and (%(whole)s or {selected})
returning d.change_id

-- name: payloads
-- Of each key's letters that are open, what the latest change holds.
select distinct on (d.key) d.key, l.payload
from distributary.dead_letter d
join distributary.change_log l on l.change_id = d.change_id
where d.target = %(target)s and d.stream = %(stream)s and d.key = any(%(key_list)s) and d.state = 'open'
order by d.key, d.change_id desc

-- name: append_originals
-- In their order, as they were: a replay has its original's idempotency key, and so must have its body. What is itself
-- a replay stands for its original.
insert into distributary.change_log (stream, key, operation, payload, changed_at, target, replays, traceparent)
select l.stream, l.key, l.operation, l.payload, l.changed_at, %(target)s, coalesce(l.replays, l.change_id), l.traceparent
from distributary.change_log l
where l.change_id = any(%(change_ids)s)
order by coalesce(l.replays, l.change_id)

-- name: discard
update distributary.dead_letter d
set state = 'discarded', note = %(note)s, updated_at = clock_timestamp(), run_id_closed = %(run_id)s
where {selected}

-- name: selected
d.state = 'open'
  and (cardinality(%(targets)s::text[]) = 0 or d.target = any(%(targets)s))
  and (cardinality(%(streams)s::text[]) = 0 or d.stream = any(%(streams)s))
  and (cardinality(%(keys)s::text[]) = 0 or d.key = any(%(keys)s))
  and (cardinality(%(change_ids_meant)s::bigint[]) = 0 or d.change_id = any(%(change_ids_meant)s))
  and (%(reason)s = '' or position(lower(%(reason)s) in lower(d.reason)) > 0)
  and (%(since)s::timestamptz is null or d.died_at >= %(since)s)
  and (%(until)s::timestamptz is null or d.died_at < %(until)s)
