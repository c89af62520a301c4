"""Golden vectors: the bytes of trust statements, gossip keys and the join, for whoever writes a second implementation.

`python -m tests.protocol.trust.test_golden` writes tests/golden/trust.json anew. A change of these bytes is a change of
the protocol: the version rises, or the mesh breaks.
"""

import json
from pathlib import Path

import msgpack
import msgspec

from protocol.ids import Address, node_id_of, root_pin
from protocol.trust.join import Begin, Transcript, encode_frame, verifier_of
from protocol.trust.join_url import JoinUrl, build_join_url, parse_join_url, token_text
from protocol.trust.keys import GossipKey, encode_key, key_id_of
from protocol.trust.roster import Roster
from protocol.wire.messages import KeyGrant, KeyRequest
from tests.protocol.trust.parts import Root, node, public_key, seed

FILE = Path(__file__).parents[2] / "golden" / "trust.json"


def vectors() -> dict[str, object]:
    """Everything, made anew. Seeds are SHA-256 of their label."""
    root = Root()
    admitted, evicted = root.admit("a", at=1_700_000_000_000, role="admin", name="Küche"), root.evict("b", at=7)
    withdrawn = root.withdraw("d", at=1_700_000_000_001)
    roster = Roster(root_public_key=root.public_key, verifier=root.verifier, statements=[admitted, root.admit("c")])
    url = JoinUrl(
        "192.168.1.10",
        4894,
        seed("token")[:8],
        seed("secret")[:16],
        root_pin(root.public_key),
        (Address("fd00::7", 9),),
    )
    transcript = Transcript(
        token_id=url.token_id,
        role="member",
        joiner_key=public_key("joiner"),
        issuer_key=public_key("issuer"),
        root_key=root.public_key,
        joiner_nonce=seed("joiner's nonce"),
        issuer_nonce=seed("issuer's nonce"),
    )
    verifier = verifier_of(url.secret)
    key = GossipKey(3, seed("gossip"), b"12345678", 1_700_000_000_000)
    return {
        "root": {
            "seed": seed("root").hex(),
            "public_key": root.public_key.hex(),
            "mesh_id": root.mesh_id,
            "pin": root_pin(root.public_key).hex(),
        },
        "node": {"label": "a", "public_key": public_key("a").hex(), "node_id": node("a")},
        "admission": admitted.hex(),
        "eviction": evicted.hex(),
        "withdrawal": withdrawn.hex(),
        "roster": {"members": list(roster.members()), "digest": roster.digest.hex()},
        "gossip_key": {
            "key": key.key.hex(),
            "key_id": key_id_of(key.key).hex(),
            "kept": encode_key(key).hex(),
            "grant": msgpack.packb([49, 3, key.key, key.minted_by]).hex(),
            "request": msgpack.packb([48, key.key_id]).hex(),
        },
        "join": {
            "secret": url.secret.hex(),
            "token_id": url.token_id.hex(),
            "token": token_text(url.token_id),
            "url": build_join_url(url),
            "verifier": verifier.hex(),
            "joiner_key": transcript.joiner_key.hex(),
            "issuer_key": transcript.issuer_key.hex(),
            "joiner_nonce": transcript.joiner_nonce.hex(),
            "issuer_nonce": transcript.issuer_nonce.hex(),
            "transcript": transcript.encode().hex(),
            "issuer_proof": transcript.issuer_proof(verifier).hex(),
            "joiner_proof": transcript.joiner_proof(verifier).hex(),
            "begin_frame": encode_frame(Begin(1, url.token_id, transcript.joiner_key, transcript.joiner_nonce)).hex(),
        },
    }


def test_the_bytes_are_still_the_same() -> None:
    assert vectors() == json.loads(FILE.read_text(encoding="utf-8"))


def test_an_independent_reader_agrees() -> None:
    """msgpack, not msgspec; the structure as the documents describe it."""
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    tag, key, name, role, at, by, invitation, first = msgpack.unpackb(bytes.fromhex(golden["admission"])[:-64])
    assert (tag, key.hex(), name, role, at) == (1, golden["node"]["public_key"], "Küche", 2, 1_700_000_000_000)
    assert (len(by), invitation, first) == (20, b"", 0)
    assert node_id_of(key) == golden["node"]["node_id"]
    tag, evicted, at, by, reason = msgpack.unpackb(bytes.fromhex(golden["eviction"])[:-64])
    assert (tag, len(evicted), at, len(by), reason) == (2, 20, 7, 20, "lost")
    tag, withdrawn, at, by = msgpack.unpackb(bytes.fromhex(golden["withdrawal"])[:-64])
    assert (tag, len(withdrawn), at, len(by)) == (3, 20, 1_700_000_000_001, 20)
    assert parse_join_url(golden["join"]["url"]).secret.hex() == golden["join"]["secret"]


def test_key_messages_are_spelled_like_the_vectors() -> None:
    key = GossipKey(3, seed("gossip"), b"12345678", 1_700_000_000_000)
    golden = json.loads(FILE.read_text(encoding="utf-8"))["gossip_key"]
    assert msgspec.msgpack.encode(KeyGrant(3, key.key, key.minted_by)).hex() == golden["grant"]
    assert msgspec.msgpack.encode(KeyRequest(key.key_id)).hex() == golden["request"]


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
