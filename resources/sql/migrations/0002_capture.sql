-- What the capture triggers call. The triggers' own functions are written per table, by `python -m resources.migrate`.

-- The row of `relation` that has the key of `identity` (a row of that table as jsonb) at this moment, our own
-- transaction's changes included; null if there is none. The columns' values go back through the text that they were
-- written as, which is exact for every type that a key may have.
create function distributary.current_row(relation oid, key_columns text[], identity jsonb) returns jsonb
language plpgsql
set search_path = pg_catalog, pg_temp
-- A row that a policy hides from us must be an error, not a row that is not there.
set row_security = off
as $function$
declare
    same_key text;
    found_row jsonb;
begin
    select string_agg(
        format('t.%1$I = ($1 ->> %1$L)::%2$s', a.attname, format_type(a.atttypid, a.atttypmod)), ' and ')
    into same_key
    from pg_attribute a
    where a.attrelid = relation and a.attname = any (key_columns);

    execute format('select to_jsonb(t) from %s t where %s', relation::regclass, same_key)
    into found_row
    using identity;
    return found_row;
end
$function$;

revoke all on function distributary.current_row from public;
