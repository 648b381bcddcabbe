-- What the catalog says of the tables to watch, and of the triggers that are there.

-- name: find_table
select c.oid, c.relkind as kind, c.relpersistence as persistence,
    c.oid::regclass::text as relation,
    n.nspname ~ '^pg_' or n.nspname in ('information_schema', 'distributary') as of_the_system,
    pg_get_userbyid(c.relowner) as owner,
    pg_has_role(current_user, c.relowner, 'usage') as may_alter,
    c.relrowsecurity and c.relforcerowsecurity and not (
        select r.rolsuper or r.rolbypassrls from pg_roles r where r.rolname = current_user) as hides_rows,
    c.relkind = 'r' and exists (select from pg_inherits i where i.inhparent = c.oid) as has_children,
    (select i.inhparent::regclass::text from pg_inherits i where i.inhrelid = c.oid and c.relispartition) as partition_of
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where n.nspname = %(schema)s::text and c.relname = %(table)s::text

-- name: table_names
select n.nspname, c.relname
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and not c.relispartition
    and n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'distributary')
order by n.nspname, c.relname

-- name: columns
with recursive typed as (
    select a.attnum, a.atttypid as type, a.atttypmod as modifier
    from pg_attribute a
    where a.attrelid = %(relation)s::oid and a.attnum > 0 and not a.attisdropped
    union all
    select typed.attnum, t.typbasetype, t.typtypmod
    from typed
    join pg_type t on t.oid = typed.type and t.typtype = 'd'
)
select a.attname as name, a.attnum,
    a.attnotnull and not exists (
        -- PostgreSQL 18: NOT NULL NOT VALID leaves older rows unchecked.
        select from pg_constraint k
        where k.conrelid = a.attrelid and k.contype = 'n' and k.conkey = array[a.attnum] and not k.convalidated
    ) as not_null,
    a.attgenerated = 'v' as virtual,
    t.typtype = 'e' as enumerated,
    t.typnamespace = 'pg_catalog'::regnamespace as built_in,
    t.typname as type,
    typed.modifier
from pg_attribute a
join typed on typed.attnum = a.attnum
join pg_type t on t.oid = typed.type and t.typtype <> 'd'
where a.attrelid = %(relation)s::oid
order by a.attnum

-- name: key_types
-- With their schemas, for whoever casts to them under another search path; 'character' alone would be one letter.
select a.attname::text,
    case when t.typnamespace = 'pg_catalog'::regnamespace then format_type(a.atttypid, a.atttypmod)
         else format('%%I.%%I', n.nspname, t.typname) end
from pg_attribute a
join pg_type t on t.oid = a.atttypid
join pg_namespace n on n.oid = t.typnamespace
where a.attrelid = %(relation)s::oid and a.attnum = any(%(numbers)s::smallint[])

-- name: unique_indexes
select i.indisprimary as is_primary,
    i.indimmediate as immediate,
    i.indisvalid and i.indisready and i.indislive as valid,
    i.indpred is null as whole,
    coalesce(bool_and(l.collisdeterministic), true) as deterministic,
    array_agg(coalesce(a.attname::text, '') order by k.place) as columns
from pg_index i
cross join unnest(i.indkey::smallint[], i.indcollation::oid[]) with ordinality as k (attnum, collation_id, place)
left join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum and k.attnum > 0
left join pg_collation l on l.oid = k.collation_id
where i.indrelid = %(relation)s::oid and i.indisunique and not i.indisexclusion and k.place <= i.indnkeyatts
group by i.indexrelid, i.indisprimary, i.indimmediate, i.indisvalid, i.indisready, i.indislive, i.indpred
order by i.indisprimary desc, i.indexrelid

-- name: partitions
-- (pg_partition_tree() would lock them.)
with recursive tree as (
    select i.inhrelid as oid from pg_inherits i where i.inhparent = %(relation)s::oid
    union all
    select i.inhrelid from tree join pg_inherits i on i.inhparent = tree.oid
)
select c.oid, c.oid::regclass::text as relation, c.relkind <> 'p' as leaf, c.relkind as kind, c.relpersistence as persistence
from tree
join pg_class c on c.oid = tree.oid
where c.relispartition
order by c.oid

-- name: functions
select p.proname as name, p.prosrc as body, p.prosecdef as definer, coalesce(p.proconfig, '{}') as settings,
    coalesce(substring(obj_description(p.oid, 'pg_proc') from 'Stream: (.*)$'), p.proname::text) as stream
from pg_proc p
where p.pronamespace = to_regnamespace('distributary') and p.prorettype = 'trigger'::regtype
    and starts_with(p.proname, 'capture_')
order by p.proname

-- name: triggers
select t.tgrelid::oid as relation, t.tgname as name, p.proname as function, t.tgtype::integer as type,
    t.tgenabled as enabled
from pg_trigger t
join pg_proc p on p.oid = t.tgfoid
where p.pronamespace = to_regnamespace('distributary') and starts_with(p.proname, 'capture_')
order by t.tgrelid, t.tgname

-- name: is_cloned
select tgparentid <> 0 from pg_trigger where tgrelid = %(relation)s::oid and tgname = %(name)s::text

-- name: relation_name
select n.nspname, c.relname
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where c.oid = %(relation)s::oid

-- name: blockers
select a.pid, coalesce(nullif(a.application_name, ''), a.usename::text, '?') as who, a.xact_start
from pg_locks l
join pg_stat_activity a on a.pid = l.pid
where l.relation = any (%(relations)s::oid[]) and l.granted and l.pid <> pg_backend_pid()
    and l.database = (select d.oid from pg_database d where d.datname = current_database())
order by a.xact_start
limit 3

-- name: look_at_tables
-- Only those that are there; a stream may also be fed by hand, without a table.
select w.stream,
       exists (
           select from pg_trigger g where g.tgrelid = c.oid and g.tgname = '!distributary' and g.tgenabled <> 'D'
       ) as captured,
       array(
           select a.attname::text from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
       ) as columns
from unnest(%(streams)s::text[], %(schemas)s::text[], %(tables)s::text[]) as w (stream, schema, name)
join pg_namespace n on n.nspname = w.schema
join pg_class c on c.relnamespace = n.oid and c.relname = w.name
