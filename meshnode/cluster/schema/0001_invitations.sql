-- One row per invitation that this node gave out. The secret itself is never stored: `verifier` checks a proof of it.
CREATE TABLE cluster_invitations (
    token_id BLOB NOT NULL PRIMARY KEY,
    verifier BLOB NOT NULL,
    role TEXT NOT NULL,
    created_by TEXT NOT NULL,
    created_wall REAL NOT NULL,
    expires_wall REAL NOT NULL,
    -- Which run of the agent made it: its monotonic time says nothing in another run.
    run TEXT NOT NULL,
    expires_monotonic REAL NOT NULL,
    wrong_proofs INTEGER NOT NULL DEFAULT 0,
    revoked_wall REAL,
    redeemed_by TEXT,
    redeemed_name TEXT,
    redeemed_wall REAL
) STRICT;

-- The latest wall-clock time that was ever seen, so that a clock set back between two runs cannot revive an invitation.
CREATE TABLE cluster_invitation_clock (
    id INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    highest_wall REAL NOT NULL
) STRICT;

INSERT INTO cluster_invitation_clock (id, highest_wall) VALUES (1, 0.0);
