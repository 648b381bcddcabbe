-- A key may be longer than a row of an index may be; what finds its dead letters is a hash of it.

drop index distributary.dead_letter_open;
create index dead_letter_open on distributary.dead_letter (target, stream, hashtextextended(key, 0)) where state = 'open';
