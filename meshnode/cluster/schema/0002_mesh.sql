-- Which mesh this node belongs to. One row: a node is in one mesh.
CREATE TABLE cluster_mesh (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    mesh_id TEXT NOT NULL,
    root_public_key BLOB NOT NULL,
    root_certificate BLOB NOT NULL,
    leaf BLOB NOT NULL,
    name TEXT NOT NULL,
    founder INTEGER NOT NULL,
    joined_at REAL NOT NULL
) STRICT;

-- The root's statements that came with the join; the records take over from there.
CREATE TABLE cluster_statements (
    statement BLOB PRIMARY KEY
) STRICT, WITHOUT ROWID;
