"""The collection in which trust statements travel: records that the root vouches for, whoever brings them."""

from protocol.records.collection import Collection
from protocol.trust.statements import TRUST_COLLECTION, TRUST_STATEMENT_BYTES_MAX, TrustRules, Verifier
from protocol.wire.limits import ROSTER_MAX


def trust_collection(root_public_key: bytes, verifier: Verifier) -> Collection:
    """Statements keyed by node id. Evictions are kept for good, so there is room for more nodes than are members."""
    rules = TrustRules(root_public_key, verifier)
    return Collection(
        TRUST_COLLECTION,
        validate=rules.validate,
        order=rules.order,
        records_max=4 * ROSTER_MAX,
        value_bytes_max=TRUST_STATEMENT_BYTES_MAX,
    )
