-- Who closed a dead letter, and why.

alter table distributary.dead_letter
    add column note   text,                                      -- of a person, for a discarded one
    add column run_id_closed text;                               -- the run that redrove or discarded it
