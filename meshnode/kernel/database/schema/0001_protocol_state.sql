-- What the protocol machines made durable (boot epoch, highest term obeyed, tombstones and the like), one row per key.
-- Only the machine that wrote a value knows how to read it, so the database sees bytes.
CREATE TABLE kernel_protocol_state (
    machine TEXT NOT NULL,
    key BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (machine, key)
) STRICT;
