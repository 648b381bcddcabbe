-- How far the rows of a table were appended to the log for one target.

create table distributary.load (
    target      text        not null references distributary.target_state,
    stream      text        not null,
    position    text[],                                          -- key columns of the last row; null: at the beginning
    rows        bigint      not null default 0,
    state       text        not null default 'running' check (state in ('running', 'done')),
    run_id      text,                                            -- the run that appended last
    started_at  timestamptz not null default clock_timestamp(),
    updated_at  timestamptz not null default clock_timestamp(),
    finished_at timestamptz,
    primary key (target, stream),
    check ((state = 'done') = (finished_at is not null))
);
