-- How far the changes of some days were appended to the log once more for one target.

create table distributary.backfill (
    target      text        not null references distributary.target_state,
    stream      text        not null,
    since       timestamptz not null,
    until       timestamptz not null,
    position    text,                                            -- the last key, or change id; null: at the beginning
    appended    bigint      not null default 0,
    state       text        not null default 'running' check (state in ('running', 'done')),
    run_id      text,                                            -- the run that appended last
    started_at  timestamptz not null default clock_timestamp(),
    updated_at  timestamptz not null default clock_timestamp(),
    primary key (target, stream, since, until)
);

-- Changes are made nearly in the order in which they stand in the log, so a summary of each stretch of it is enough to
-- find a day; and it costs a writer next to nothing.
create index change_log_changed_at on distributary.change_log using brin (changed_at) with (autosummarize = on);
