declare
    -- As the columns are called now: migrations may rename them at any time.
    key_columns text[] := {key_columns};
    excluded    text[] := {exclude};
    names_now   text[];
    partition_name text;
    renamed     boolean := false;
    superseded  boolean := false;
    before      jsonb;
    after       jsonb;
    before_key  text;
    after_key   text;
begin
    if tg_op = 'UPDATE' then
        -- Byte for byte, because json, xml and point have no equality and 1.0 = 1.00.
        if old operator(pg_catalog.*=) new then
            return null;
        end if;
        before := to_jsonb(old);
        after := to_jsonb(new);
        superseded := new.xmax <> '0';
    elsif tg_op = 'INSERT' then
        after := to_jsonb(new);
        superseded := new.xmax <> '0';
    elsif tg_op = 'DELETE' then
        before := to_jsonb(old);
    elsif current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        -- TRUNCATE removes also the rows that were committed after this transaction's snapshot: we cannot see them, so
        -- their deletes would be lost.
        raise exception using
            errcode = 'feature_not_supported',
            message = format('TRUNCATE of %s in a %s transaction could remove rows unseen, and their deletes would be lost',
                tg_relid::regclass, upper(current_setting('transaction_isolation'))),
            hint = 'Use READ COMMITTED, or DELETE.';
    end if;

    -- A column of the configuration is not in the row: it was renamed or dropped after `python -m resources.migrate`. An
    -- excluded column must stay out under any name; a key must stay the key; and nobody's write may fail for it.
    if tg_op = 'TRUNCATE' or not coalesce(after, before) ?& {recorded_columns} then
        names_now := array(
            select a.attname::text
            from unnest({attribute_numbers}) with ordinality as n (attnum, place)
            left join pg_attribute a on a.attrelid = {relation} and a.attnum = n.attnum
            order by n.place);
        if array_position(names_now, null) is not null then
            raise exception using
                errcode = 'undefined_column',
                message = format('the capture of %s does not know the table: it was installed for another one', tg_relid::regclass),
                hint = 'Run python -m resources.migrate.';
        end if;
        key_columns := names_now[1:{key_length}];
        excluded := names_now[{key_length} + 1:];
        renamed := key_columns <> {key_columns};
    end if;

    if tg_op = 'TRUNCATE' then
        {truncate}
        return null;
    end if;

    -- The new row is not the last word on this key: before this trigger had its turn, another trigger of the same
    -- statement (a cascade, one that keeps a total) changed the row again, and that change is in the log already. What is
    -- appended now must not be older, so it is the row as it stands. (Every version that we made and nobody replaced
    -- has no xmax; one that others merely lock may have, and is found to be unchanged.)
    if superseded then
        after := distributary.current_row({relation}, key_columns, after);
    end if;

    -- A renamed key column is also given under the name that the configuration knows.
    if renamed then
        before := before || (select jsonb_object_agg(n.was, before -> n.now) from unnest({key_columns}, key_columns) n (was, now));
        after := after || (select jsonb_object_agg(n.was, after -> n.now) from unnest({key_columns}, key_columns) n (was, now));
    end if;

    if {has_exclude} then
        before := before - excluded;
        after := after - excluded;
        if before is not null and after is not null and row(before)::record operator(pg_catalog.*=) row(after)::record then
            return null;
        end if;
    end if;

    if before is null and after is null then
        return null;
    end if;
    before_key := {before_key};
    after_key := {after_key};
    if (before is not null and before_key is null) or (after is not null and after_key is null) then
        raise exception using
            errcode = 'not_null_violation',
            message = format('a row of %s has no key (%s): the change cannot be captured', tg_relid::regclass,
                array_to_string({key_columns}, ', ')),
            hint = 'Name another key in source.yaml and run python -m resources.migrate.';
    end if;

    if before_key = after_key then
        if {logs_update} then
            insert into distributary.change_log (stream, key, operation, payload) values ({stream}, after_key, 'update', after);
        end if;
        return null;
    end if;

    if before is not null and {logs_delete} then
        insert into distributary.change_log (stream, key, operation, payload) values ({stream}, before_key, 'delete', before);
        -- Had a trigger put the key back before this one had its turn, then the insert is in the log already, before this
        -- delete; so it is said again.
        if {logs_insert} and current_setting({inserted_within}, true) = 'on' then
            insert into distributary.change_log (stream, key, operation, payload)
            select {stream}, before_key, 'insert', r.found - excluded
            from distributary.current_row({relation}, key_columns, before) r (found)
            where r.found is not null;
        end if;
    end if;
    if after is not null and {logs_insert} then
        insert into distributary.change_log (stream, key, operation, payload) values ({stream}, after_key, 'insert', after);
        if pg_trigger_depth() > 1 then
            perform set_config({inserted_within}, 'on', true);
        end if;
    end if;
    return null;
end
