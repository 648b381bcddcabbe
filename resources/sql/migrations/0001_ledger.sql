-- The change log, what every target has of it, and the trail of requests.

create table distributary.change_log (
    -- FIRST column: its default makes the transaction's id exist before change_id is drawn. Closing gaps depends on it.
    xid         xid8        not null default pg_current_xact_id(),
    -- Drawn while the row's lock is held, so per key it is the true order. A cached id could be used long after it was
    -- drawn, hence cache 1.
    change_id   bigint      generated always as identity (cache 1) primary key,
    stream      text        not null,
    key         text        not null,
    operation   text        not null check (operation in ('insert', 'update', 'delete', 'snapshot')),
    payload     jsonb       not null,                            -- the row; of a delete, the row as it was
    changed_at  timestamptz not null default clock_timestamp(),
    target      text,                                            -- addressed: meant for this target only
    replays     bigint,                                          -- the change that this one sends again
    traceparent text                                             -- W3C trace context of who made the change
);

-- Which log this is. In another database the ids begin anew and mean other changes: keys are made in its namespace.
create table distributary.log_identity (
    log_id    uuid    not null default gen_random_uuid(),
    singleton boolean primary key default true check (singleton)
);
insert into distributary.log_identity default values;

create table distributary.target_state (
    target               text           primary key check (target ~ '^[a-z][a-z0-9_]*$'),
    target_id            integer        not null generated always as identity unique,  -- names the drain's advisory lock
    settled              int8multirange not null default '{}',
    claimed              int8multirange not null default '{}',
    before_start         bigint         not null default 0,      -- changes already there when a target began with 'now'
    accepted             bigint         not null default 0,
    superseded           bigint         not null default 0,
    filtered             bigint         not null default 0,
    dead                 bigint         not null default 0,
    status               text           not null default 'active' check (status in ('active', 'paused', 'disabled')),
    reason               text,                                   -- why it is paused, disabled or held back
    failed_runs          integer        not null default 0,      -- in a row, the target's fault; > 0: the breaker is open
    retry_at             timestamptz,                            -- not before this; then one request as the probe
    fence_xid            xid8,                                   -- once every older transaction is over …
    fence_change_id      bigint,                                 -- … every id up to this one is decided
    created_at           timestamptz    not null default now(),
    updated_at           timestamptz    not null default now(),
    check (isempty(settled * claimed))
) with (fillfactor = 50);  -- rewritten with every group commit: leave room for the new version on the same page

create table distributary.batch (
    batch_id        bigint      generated always as identity primary key,
    target          text        not null references distributary.target_state,
    lane            integer     not null,
    stream          text        not null,
    operation       text        not null check (operation in ('upsert', 'insert', 'update', 'delete')),
    change_ids      bigint[]    not null,
    idempotency_key uuid        not null,
    -- claimed: may be in flight
    --   -> settled: every member was accepted or dead-lettered
    state           text        not null default 'claimed' check (state in ('claimed', 'settled')),
    accepted        integer     not null default 0,
    dead            integer     not null default 0,
    attempts        integer     not null default 0,              -- requests sent, the parts of a split batch included
    status_code     integer,                                     -- of the last answer
    latency_ms      real,                                        -- of the last answer
    error           text,
    run_id          text,
    claimed_at      timestamptz not null default now(),
    finished_at     timestamptz,
    check ((state = 'claimed') = (finished_at is null))
);
create index batch_in_flight on distributary.batch (target, batch_id) where state = 'claimed';

create table distributary.dead_letter (
    target      text        not null references distributary.target_state,
    change_id   bigint      not null,
    stream      text        not null,
    key         text        not null,
    operation   text        not null,
    reason      text        not null,
    status_code integer,
    response    text,                                            -- excerpt of the answer, credentials removed
    attempts    integer     not null default 1,
    run_id      text,
    -- open -> redriven (appended again as an addressed record)
    --      -> superseded (a newer state of the key was accepted)
    --      -> discarded (by a person, with a reason)
    state       text        not null default 'open' check (state in ('open', 'redriven', 'superseded', 'discarded')),
    died_at     timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    primary key (target, change_id)
);
create index dead_letter_open on distributary.dead_letter (target, stream, key) where state = 'open';
