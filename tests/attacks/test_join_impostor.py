"""Case 13: somebody in the middle of a join. The joiner stops before it has sent any secret or proof.

Four of them: one with a root of its own; an evicted machine, which still has a leaf of the right root; the same one
passing everything on to the real issuer; and a wire tap.
"""

from pathlib import Path

import pytest

from meshnode.cluster.service.onboarding import joiner as joiner_module
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import found_root, issue_leaf, load_or_make_identity, root_certificate
from protocol.trust.join import Begin, Claim, Terms, Transcript, decode_from_joiner, verifier_of
from protocol.trust.join_url import JoinUrl, build_join_url, parse_join_url
from tests.support.join_attacker import Impostor, Wiretap
from tests.support.onboarding import MeshOfOne, open_mesh

TERMS = Terms(1, b"\x01" * 32, b"\x02" * 32, "kitchen")


def messages(heard: bytes) -> list[object]:
    """The frames that an impostor heard."""
    found: list[object] = []
    while heard:
        size = int.from_bytes(heard[:4], "big")
        found.append(decode_from_joiner(heard[4 : 4 + size]))
        heard = heard[4 + size :]
    return found


def impostor_with_own_root(folder: Path) -> Impostor:
    root, identity = found_root(), load_or_make_identity(folder / "impostor")
    return Impostor(identity, issue_leaf(root, identity.public_key), root_certificate(root))


def evicted_machine(mesh: MeshOfOne, *, relay_to: int | None = None) -> Impostor:
    """It was a member; its leaf is good for ever, only its key is on the tombstone."""
    identity = load_or_make_identity(mesh.folder / "evicted")
    leaf = issue_leaf(mesh.root, identity.public_key)
    mesh.admin.evict(identity.node_id)
    return Impostor(identity, leaf, root_certificate(mesh.root), relay_to=relay_to)


async def join_through(mesh: MeshOfOne, port: int) -> tuple[str, JoinUrl]:
    """Join with the real URL, whose address now leads to `port`. Gives the outcome."""
    url = parse_join_url((await mesh.invite()).url)
    led = JoinUrl(url.host, port, url.token_id, url.secret, url.pin)
    try:
        await mesh.join(build_join_url(led))
    except MeshError as error:
        return error.code.value, led
    return "joined", led


async def test_another_root_hears_nothing_at_all(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        impostor = impostor_with_own_root(data_dir)
        impostor.terms = TERMS
        async with impostor.listening() as port:
            outcome, _ = await join_through(mesh, port)
        assert outcome == ErrorCode.PIN_MISMATCH
        assert impostor.heard == b""


async def test_without_the_pin_it_hears_who_comes(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joiner_module, "root_matches", lambda _pin, _root: True)
    async with open_mesh(data_dir) as mesh:
        impostor = impostor_with_own_root(data_dir)
        impostor.terms = TERMS
        async with impostor.listening() as port:
            outcome, _ = await join_through(mesh, port)
        assert outcome == ErrorCode.JOIN_REFUSED  # the second defence: it cannot prove that it knows the invitation
        assert [type(message) for message in messages(impostor.heard)] == [Begin]


async def test_without_both_it_gets_the_proof(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joiner_module, "root_matches", lambda _pin, _root: True)
    monkeypatch.setattr(joiner_module, "same_proof", lambda _expected, _given: True)
    async with open_mesh(data_dir) as mesh:
        impostor = impostor_with_own_root(data_dir)
        impostor.terms = TERMS
        async with impostor.listening() as port:
            await join_through(mesh, port)
        assert [type(message) for message in messages(impostor.heard)] == [Begin, Claim]


async def test_a_stolen_certificate_without_its_key_hears_nothing(data_dir: Path) -> None:
    """It shows the founder's public leaf in the Offer, while TLS was spoken with a key of its own."""
    async with open_mesh(data_dir) as mesh:
        impostor = evicted_machine(mesh)
        impostor.offer = type(impostor.offer)(1, 1, root_certificate(mesh.root), mesh.leaf)
        impostor.terms = TERMS
        async with impostor.listening() as port:
            outcome, _ = await join_through(mesh, port)
        assert outcome == ErrorCode.PIN_MISMATCH
        assert impostor.heard == b""


async def test_an_evicted_machine_gets_no_proof(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        impostor = evicted_machine(mesh)
        impostor.terms = TERMS
        async with impostor.listening() as port:
            outcome, _ = await join_through(mesh, port)
        assert outcome == ErrorCode.JOIN_REFUSED
        # Token id, public key and a nonce: nothing that is secret, and nothing made from a secret.
        assert [type(message) for message in messages(impostor.heard)] == [Begin]


async def test_without_the_issuers_proof_it_does(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joiner_module, "same_proof", lambda _expected, _given: True)
    async with open_mesh(data_dir) as mesh:
        impostor = evicted_machine(mesh)
        impostor.terms = TERMS
        async with impostor.listening() as port:
            await join_through(mesh, port)
        begin, claim = messages(impostor.heard)
        assert isinstance(begin, Begin)
        assert isinstance(claim, Claim)


async def test_an_evicted_machine_that_passes_everything_on_gains_nothing(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        await mesh.invite()
        impostor = evicted_machine(mesh, relay_to=mesh.port)
        async with impostor.listening() as port:
            outcome, _ = await join_through(mesh, port)
        assert outcome == ErrorCode.JOIN_REFUSED
        assert [type(message) for message in messages(impostor.heard)] == [Begin]
        assert mesh.admin.admitted == []


async def test_without_the_binding_to_the_issuers_key_it_reads_the_gossip_key(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Transcript.encode
    monkeypatch.setattr(
        Transcript, "encode", lambda self: whole(Transcript(**{**_parts(self), "issuer_key": b"\x00" * 32}))
    )
    async with open_mesh(data_dir) as mesh:
        await mesh.invite()
        impostor = evicted_machine(mesh, relay_to=mesh.port)
        async with impostor.listening() as port:
            outcome, _ = await join_through(mesh, port)
        assert outcome == "joined"
        assert mesh.admin.gossip_keys()[0].key in impostor.overheard


def _parts(transcript: Transcript) -> dict[str, object]:
    return {name: getattr(transcript, name) for name in Transcript.__slots__}


async def test_a_wire_tap_reads_nothing_of_use(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        await mesh.invite()
        tap = Wiretap(mesh.port)
        async with tap.listening() as port:
            outcome, url = await join_through(mesh, port)
        assert outcome == "joined"
        assert len(tap.seen) > 2_000
        for secret in (url.secret, verifier_of(url.secret), url.token_id, mesh.admin.gossip_keys()[0].key):
            assert secret not in tap.seen
