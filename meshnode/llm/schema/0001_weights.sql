-- Model files on this node, one row for each part: downloaded whole into the models folder (owned), or contributed from
-- where they lie. Size and modification time tell whether a file is still the one that was looked at.
CREATE TABLE llm_files (
    digest TEXT NOT NULL,
    part INTEGER NOT NULL,
    path TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    modified_ns INTEGER NOT NULL,
    owned INTEGER NOT NULL,
    used_wall REAL NOT NULL,
    PRIMARY KEY (digest, part)
) STRICT;

-- Layers of models, each range a file of its own in the models folder.
CREATE TABLE llm_slices (
    digest TEXT NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    tail INTEGER NOT NULL,
    path TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    modified_ns INTEGER NOT NULL,
    content TEXT NOT NULL, -- BLAKE3, hex
    used_wall REAL NOT NULL,
    PRIMARY KEY (digest, first, last, tail)
) STRICT;

-- What was asked for and is not here yet: taken up again at the next start.
CREATE TABLE llm_stagings (
    digest TEXT NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    tail INTEGER NOT NULL,
    PRIMARY KEY (digest, first, last, tail)
) STRICT;

CREATE TABLE llm_pulls (
    ref TEXT NOT NULL,
    node TEXT NOT NULL, -- empty: the mesh
    whole INTEGER NOT NULL,
    PRIMARY KEY (ref, node, whole)
) STRICT;
