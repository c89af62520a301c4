-- One row, written again and again: that a write reaches the disk is what the health check of the database shows.
CREATE TABLE health_probe (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    written_at REAL NOT NULL  -- unix seconds
) STRICT;
