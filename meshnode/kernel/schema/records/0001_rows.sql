-- Replicated records (protocol.records): one row per key, in the bytes that their author signed. The columns beside
-- `record` repeat what searching and starting need, so that 100,000 records start without being decoded.
CREATE TABLE records_authors (
    id INTEGER PRIMARY KEY,
    public_key BLOB NOT NULL UNIQUE
) STRICT;

CREATE TABLE records_rows (
    collection TEXT NOT NULL,
    key_hash INTEGER NOT NULL, -- 64 unsigned bits less 2^63: SQLite's integers are signed, and the order stays
    version INTEGER NOT NULL,  -- likewise
    hlc INTEGER NOT NULL,
    author INTEGER NOT NULL REFERENCES records_authors (id),
    deleted INTEGER NOT NULL,
    key BLOB NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (collection, key_hash)
) STRICT, WITHOUT ROWID;

CREATE INDEX records_rows_key ON records_rows (collection, key, key_hash) WHERE deleted = 0;
CREATE INDEX records_rows_deleted ON records_rows (collection, key_hash) WHERE deleted = 1;
