-- A batch that is sent in several requests is written down as several: what was sent is always what was written.

alter table distributary.batch
    add column part_of bigint,                                   -- the batch, as it was claimed, that this is a part of
    drop constraint batch_state_check,
    -- claimed: may be in flight
    --   -> settled: every member was accepted or dead-lettered
    --   -> split: what was left of it goes on in batches of its own
    add constraint batch_state_check check (state in ('claimed', 'settled', 'split'));
