"""Who belongs: root-signed admissions and tombstones, the roster they make, join proofs, and the gossip keys."""
