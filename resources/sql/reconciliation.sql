-- One stream of one target: what was listed, what was found.

-- name: try_lock
-- A session lock, on the connection that writes: a crash frees it.
select pg_try_advisory_lock(1684632437, hashtext(%(target)s || '/' || %(stream)s))

-- name: current
-- After a crash of the server what is not logged is empty, while the listing says that it is not. And after a day the
-- changes that came since it began may be pruned.
select g.listing_id, g.fingerprint, g.next, g.state = 'complete', g.listed, g.unkeyed, g.pages, g.total,
       extract(epoch from clock_timestamp() - g.updated_at)::float8 as age,
       (select count(*) from distributary.listed l where l.listing_id = g.listing_id) = g.listed
       and g.started_at > clock_timestamp() - interval '1 day' as whole
from distributary.listing g
where g.target = %(target)s and g.stream = %(stream)s

-- name: begin
insert into distributary.listing (target, stream, fingerprint, settled, next, run_id)
select s.target, %(stream)s, %(fingerprint)s, s.settled, %(next)s, %(run_id)s
from distributary.target_state s
where s.target = %(target)s
returning listing_id

-- name: make_partitions
create unlogged table distributary.{listed} partition of distributary.listed for values in ({listing_id});
create unlogged table distributary.{found} partition of distributary.found for values in ({listing_id})

-- name: drop_partitions
drop table if exists distributary.{listed};
drop table if exists distributary.{found}

-- name: forget
delete from distributary.listing where listing_id = %(listing_id)s

-- name: abandoned
-- Left by runs that never came back, of targets or streams that nobody reconciles any more.
select listing_id
from distributary.listing
where updated_at < clock_timestamp() - interval '2 days'
  and not exists (
      select
      from pg_locks k
      where k.locktype = 'advisory' and k.granted and k.objsubid = 2
        and k.database = (select oid from pg_database where datname = current_database())
        and k.classid::bigint = 1684632437
        and k.objid::bigint = hashtext(target || '/' || stream)::bigint & 4294967295
  )

-- name: add_records
-- Counted is what was not there before: a statement does not see what it writes itself.
with given as materialized (
    select * from unnest(%(matches)s::text[], %(records)s::text[]) as given (match, record)
),
written as (
    insert into distributary.listed (listing_id, match, record)
    select %(listing_id)s, match, record from given
    on conflict (listing_id, match) do update set record = excluded.record
)
select count(*)
from given
where not exists (
    select from distributary.listed l where l.listing_id = %(listing_id)s and l.match = given.match collate "C"
)

-- name: advance
update distributary.listing
set next = coalesce(%(next)s::text, next), state = case when %(next)s::text is null then 'complete' else 'running' end,
    pages = pages + 1, listed = listed + %(listed)s, unkeyed = unkeyed + %(unkeyed)s, total = %(total)s::bigint,
    run_id = %(run_id)s, updated_at = clock_timestamp()
where listing_id = %(listing_id)s

-- name: list_again
update distributary.listing
set next = %(next)s, state = 'running', unkeyed = 0, updated_at = clock_timestamp()
where listing_id = %(listing_id)s

-- name: listed
select l.match, l.record
from distributary.listed l
where l.listing_id = %(listing_id)s and l.match = any(%(matches)s::text[])

-- name: forget_found
truncate distributary.{found}

-- name: note
insert into distributary.found (listing_id, match, key, kind, fields, reason)
select %(listing_id)s, n.match, n.key, n.kind, n.fields, n.reason
from unnest(%(matches)s::text[], %(keys)s::text[], %(kinds)s::text[], %(fields)s::jsonb[], %(reasons)s::text[])
     as n (match, key, kind, fields, reason)

-- name: analyze
analyze distributary.{listed};
analyze distributary.{found}

-- name: mark_in_flight
update distributary.found f
set kind = 'in_flight'
where f.listing_id = %(listing_id)s and f.kind in ('missing', 'stale', 'extra', 'unrenderable')
  and f.match in ({selected})

-- name: mark_dead
update distributary.found f
set kind = 'dead'
from distributary.listing g
where f.listing_id = %(listing_id)s and g.listing_id = f.listing_id and f.kind in ('missing', 'stale', 'extra', 'unrenderable')
  and f.match in (
      select case when %(composite)s
                  then (select jsonb_agg(part order by place)::text
                        from jsonb_array_elements_text(d.key::jsonb) with ordinality as p (part, place))
                  else d.key end
      from distributary.dead_letter d
      where d.target = g.target and d.stream = g.stream and d.state = 'open'
  )

-- name: mark_twins
-- A target that writes keys its own way has the record of a row that seems missing, under a key that seems extra.
with keys as materialized (
    select match, kind, key,
           lower(btrim(case when getdatabaseencoding() = 'UTF8' then normalize(match, nfkc) else match end)
                 collate "default") as plain
    from distributary.found
    where listing_id = %(listing_id)s and kind in ('missing', 'in_flight', 'dead', 'extra')
      and exists (select from distributary.found where listing_id = %(listing_id)s and kind = 'extra')
)
update distributary.found f
set reason = twin.key || ' of the source, written another way: not to be deleted'
from keys as extra
join keys as twin on twin.plain = extra.plain and twin.kind <> 'extra' and twin.key is not null
where f.listing_id = %(listing_id)s and f.match = extra.match and extra.kind = 'extra'

-- name: moving
select count(*) from ({selected}) as moving

-- name: selected
-- The keys of changes that were not settled when the listing began, or that came since. Of a key of several columns the
-- parts as text, as they are matched.
select case when %(composite)s
            then (select jsonb_agg(part order by place)::text
                  from jsonb_array_elements_text(c.key::jsonb) with ordinality as p (part, place))
            else c.key end as match
from distributary.listing g
cross join unnest(int8multirange(int8range(0, null)) - g.settled) as gap
cross join lateral (
    select l.key
    from distributary.change_log l
    where l.change_id >= lower(gap) and l.change_id < coalesce(upper(gap), 9223372036854775807)
      and l.stream = g.stream and (l.target is null or l.target = g.target)
) c
where g.listing_id = %(listing_id)s

-- name: counts
select kind, count(*) from distributary.found where listing_id = %(listing_id)s group by kind

-- name: differing_fields
select field, count(*)
from distributary.found f
cross join jsonb_array_elements_text(f.fields) as field
where f.listing_id = %(listing_id)s and f.kind = 'stale'
group by field
order by count(*) desc, field
limit 100

-- name: samples
select k.kind, s.match, s.key, s.fields, s.reason
from unnest(array['missing', 'stale', 'extra', 'in_flight', 'dead', 'unrenderable']) as k (kind)
cross join lateral (
    select f.match, f.key, f.fields, f.reason
    from distributary.found f
    where f.listing_id = %(listing_id)s and f.kind = k.kind
    order by f.match
    limit %(limit)s
) s

-- name: some_missing
select f.key
from distributary.found f
where f.listing_id = %(listing_id)s and f.kind = 'missing'
  and (%(among)s::text[] is null or f.match = any(%(among)s::text[]))
order by random()
limit %(limit)s

-- name: loaded
select exists (
    select from distributary.load where target = %(target)s and stream = %(stream)s and state = 'done'
)

-- name: next_found
select f.match, f.key, f.reason
from distributary.found f
where f.listing_id = %(listing_id)s and f.kind = %(kind)s and (%(after)s::text is null or f.match > %(after)s)
order by f.match
limit %(limit)s
