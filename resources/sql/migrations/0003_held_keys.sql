-- What keeps a key's later changes waiting.

-- Of a dead letter that was never sent: the earlier change of its key because of which (`on_dead: block`).
alter table distributary.dead_letter add column blocked_by bigint;

-- Runs that gave up on the batch while it might be its records' fault, not the target's.
alter table distributary.batch add column set_aside integer not null default 0;
