-- Of what a backfill appended: how many records of each day.

alter table distributary.backfill
    add column by_day jsonb not null default '{}';   -- {"2026-01-31": 12}: by the day, in UTC, of the change that they repeat
