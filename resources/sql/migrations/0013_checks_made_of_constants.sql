-- `in (…)` is kept as a constant for each word, and every statement that writes a row makes an array of them first: 9 µs, in
-- every transaction that is captured. One that is written as an array is there already. What the tables hold was held to the
-- same, so it is not looked through again, however much that is.

alter table distributary.change_log
    drop constraint change_log_operation_check,
    add constraint change_log_operation_check
        check (operation = any ('{insert,update,delete,snapshot}'::text[])) not valid;

alter table distributary.target_state
    drop constraint target_state_status_check,
    add constraint target_state_status_check check (status = any ('{active,paused,disabled}'::text[])) not valid;

alter table distributary.batch
    drop constraint batch_operation_check,
    add constraint batch_operation_check check (operation = any ('{upsert,insert,update,delete}'::text[])) not valid,
    drop constraint batch_state_check,
    -- claimed: may be in flight
    --   -> settled: every member was accepted or dead-lettered
    --   -> split: what was left of it goes on in batches of its own
    add constraint batch_state_check check (state = any ('{claimed,settled,split}'::text[])) not valid;
