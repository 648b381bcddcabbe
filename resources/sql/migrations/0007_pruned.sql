-- Changes that were removed from the log, so that what is where still adds up.

alter table distributary.target_state add column pruned bigint not null default 0;

create index batch_finished on distributary.batch (finished_at) where finished_at is not null;
