-- Removing what nobody needs any more. Nothing here waits for writers, nor they for it.

-- name: states
select s.target, s.status, s.updated_at from distributary.target_state s order by s.target

-- name: prune_changes
-- A chunk of the log in the order of its ids. A change goes if it is old enough, if each target that is 'holding' has
-- settled it, and if no open dead letter may need it again. To a target that is not holding, what it had not settled is
-- filtered: nothing is owed of it any more.
with chunk as materialized (
    select change_id, target, changed_at < %(before)s as old
    from distributary.change_log
    where change_id > %(after)s
    order by change_id
    limit %(limit)s
),
holding as materialized (
    select target, settled from distributary.target_state where target = any(%(holding)s)
),
gone as (
    delete from distributary.change_log l
    using chunk c
    where l.change_id = c.change_id and c.old
      and not exists (
          select from holding h
          where (c.target is null or c.target = h.target) and not h.settled @> c.change_id
      )
      and not exists (select from distributary.dead_letter d where d.change_id = c.change_id and d.state = 'open')
    returning l.change_id, l.target
),
missed as (
    select t.target, count(*) as pruned, count(*) filter (where not t.settled @> g.change_id) as dropped,
           coalesce(range_agg(int8range(g.change_id, g.change_id, '[]')) filter (where not t.settled @> g.change_id), '{}')
               as ids
    from distributary.target_state t
    join gone g on g.target is null or g.target = t.target
    group by t.target
),
counted as (
    update distributary.target_state s
    set pruned = s.pruned + m.pruned,
        filtered = s.filtered + m.dropped,
        settled = s.settled + m.ids,
        claimed = s.claimed - m.ids
    from missed m
    where s.target = m.target
)
select (select max(change_id) from chunk), (select count(*) from gone), coalesce((select bool_or(old) from chunk), false),
       coalesce((select jsonb_object_agg(target, dropped) from missed where dropped > 0), '{}')

-- name: prune_batches
with old as (
    select batch_id from distributary.batch where finished_at < %(before)s order by finished_at limit %(limit)s
)
delete from distributary.batch b using old where b.batch_id = old.batch_id

-- name: prune_empty_claims
-- Batches of a target that no longer holds the log, of which nothing is left.
update distributary.batch b
set state = 'settled', finished_at = clock_timestamp()
from distributary.target_state s
where b.target = s.target and s.target = any(%(dropped)s) and b.state = 'claimed'
  and not exists (select from unnest(b.change_ids) as id where s.claimed @> id)
