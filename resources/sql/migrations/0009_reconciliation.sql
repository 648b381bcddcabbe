-- Where a target's list and the source's rows are laid side by side. It can all be made anew, so it is not logged.

create table distributary.listing (
    listing_id  bigint         primary key generated always as identity,
    target      text           not null references distributary.target_state,
    stream      text           not null,
    fingerprint text           not null,                         -- how the target was read; another way is another list
    settled     int8multirange not null,                         -- of the target, when the listing began
    next        text           not null,                         -- path of the page to ask for next
    state       text           not null default 'running' check (state in ('running', 'complete')),
    pages       bigint         not null default 0,
    listed      bigint         not null default 0,               -- records with a key, each once
    unkeyed     bigint         not null default 0,               -- records with none
    total       bigint,                                          -- what the last page said there are
    run_id      text,
    started_at  timestamptz    not null default clock_timestamp(),
    updated_at  timestamptz    not null default clock_timestamp(),
    unique (target, stream)
);

-- A partition for each listing, dropped with it: a million records are gone at once, and from the disk too.
create table distributary.listed (
    listing_id bigint not null,
    match      text   collate "C" not null,                      -- the source's key, as far as it can be told
    record     text   not null,                                  -- what is compared of it, as JSON
    primary key (listing_id, match)
) partition by list (listing_id);

create table distributary.found (
    listing_id bigint not null,
    match      text   collate "C" not null,
    key        text,                                             -- the source's; null of what it has not got
    kind       text   not null check (kind in ('missing', 'stale', 'extra', 'in_flight', 'dead', 'unrenderable')),
    fields     jsonb  not null default '[]',                     -- names of those that differ
    reason     text,
    primary key (listing_id, match)
) partition by list (listing_id);
