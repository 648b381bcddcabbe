-- The migrator's own record of what it has done.

-- name: schema_exists
select to_regnamespace('distributary') is not null

-- name: record_exists
select to_regclass('distributary.migration') is not null

-- name: tables
select oid from pg_class where relnamespace = to_regnamespace('distributary') and relkind = 'r'

-- name: applied
select name, checksum from distributary.migration order by name

-- name: record
insert into distributary.migration (name, checksum) values (%(name)s, %(checksum)s)

-- name: sequence_cache
select s.seqcache
from pg_sequence s
where s.seqrelid = pg_get_serial_sequence('distributary.change_log', 'change_id')::regclass
