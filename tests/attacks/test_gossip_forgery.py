"""Cases 1 to 4: forged and replayed gossip, forged sequence numbers, an evicted node that is gossiped as alive.

Every attack runs against the real hub as it is, and once more with its one defence taken away, where it must succeed.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from meshnode.kernel.database.keyvalue import KeyValue, kernel_migrations
from meshnode.kernel.database.store import open_database
from meshnode.node import founding
from protocol.effects import Effect, SendDatagram
from protocol.heartbeats.machine import Heartbeats
from protocol.ids import node_id_bytes, pack_address
from protocol.trust import roster as roster_module
from protocol.trust.statements import Eviction, TrustStatement
from protocol.wire.crypto import SodiumSuite
from protocol.wire.messages import Alive, Gossip, Heartbeat, Ping
from protocol.wire.replay import ReplayWindow
from protocol.wire.statements import Forgers, StatementCodec
from tests.protocol.trust.parts import public_key, seed
from tests.protocol.wire import by_hand
from tests.protocol.wire.hubs import GOSSIP_KEY, Host, Hubs, encode, settled, statement

PING = Ping(77, bytes(8))


def answers(effects: list[Effect]) -> int:
    """How many datagrams a packet caused: an Ack, if it was believed."""
    return sum(isinstance(effect, SendDatagram) for effect in effects)


def heartbeat(host: Host, number: int) -> Heartbeat:
    """A heartbeat that says of this host what it never would: its memory is full of 999,999 MB."""
    return Heartbeat(host.short, host.boot, number, 40, 0, 0, 999_999, 0, -1, -1, -1, 0, -1, 0, 1, -1, bytes(8), 0)


def believe_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SodiumSuite, "verify", lambda self, key, domain, body, signature: True)


# ---- case 1 ----


@pytest.mark.parametrize("defended", [True, False])
def test_case_01_a_heartbeat_in_anothers_name_changes_nothing(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = settled("victim", "reader", "liar")
    victim, reader = mesh["victim"], mesh["reader"]
    if not defended:
        believe_everybody(monkeypatch)
    forged = statement("liar", mesh.root, heartbeat(victim, 10_000))
    mesh.tell("liar", "reader", Gossip([forged]))
    known: Heartbeats = reader.live.heartbeats
    assert (known.latest[victim.node_id][0].ram_used_mb == 999_999) is not defended
    assert (reader.live.codec.drops["forged"] == 1) is defended


def test_case_01_one_altered_byte_spoils_a_heartbeat_that_is_passed_on() -> None:
    mesh = settled("victim", "reader", "liar")
    blob = statement("victim", mesh.root, heartbeat(mesh["victim"], 10_000))
    reader = mesh["reader"].live
    for at in range(len(blob)):
        altered = blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]
        reader.codec.forgers = Forgers()  # or the liar would soon not be listened to at all
        mesh.tell("liar", "reader", Gossip([altered]))
        assert reader.heartbeats.latest[mesh["victim"].node_id][0].ram_used_mb != 999_999
    assert sum(reader.codec.drops.values()) == len(blob)
    reader.codec.forgers = Forgers()
    mesh.tell("liar", "reader", Gossip([blob]))
    assert reader.heartbeats.latest[mesh["victim"].node_id][0].ram_used_mb == 999_999


def sealed_as_victim(mesh: Hubs, shared: bytes) -> bytes:
    """What a member makes that writes another's short id into the header and seals with what it can derive."""
    victim, reader = mesh["victim"], mesh["reader"]
    ids = [by_hand.node_bytes(public_key(label)) for label in ("victim", "reader")]
    pair = by_hand.pair_key(GOSSIP_KEY.key, shared, ids[0], ids[1], reader.boot)
    mesh_id = by_hand.mesh_bytes(mesh.root.public_key)
    head = by_hand.header(mesh_id, GOSSIP_KEY.key_id, ids[0], victim.boot, 1_000_000)
    return by_hand.seal(pair, head, encode([PING]))


@pytest.mark.parametrize("defended", [True, False])
def test_case_01_a_member_cannot_seal_as_another(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the secret of the pair, every holder of the gossip key could speak for everybody."""
    shared = by_hand.Identity(seed("liar")).shared_with(public_key("reader"))
    if not defended:
        shared = b""

        def without_secret(self: Any, gossip: bytes, peer: bytes, sender: Any, receiver: Any, boot: int) -> bytes:
            return by_hand.pair_key(gossip, b"", node_id_bytes(sender), node_id_bytes(receiver), boot)

        monkeypatch.setattr(SodiumSuite, "pair_key", without_secret)
    mesh = settled("victim", "reader", "liar")
    effects = mesh.deliver(mesh["reader"], sealed_as_victim(mesh, shared), mesh["liar"].address)
    assert answers(effects) == (0 if defended else 1)
    assert (mesh["reader"].live.datagrams.drops["forged"] == 1) is defended


# ---- case 2 ----


@pytest.mark.parametrize("defended", [True, False])
def test_case_02_a_replay_is_dropped(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not defended:
        monkeypatch.setattr(ReplayWindow, "commit", lambda self, boot, sequence: None)
    mesh = settled("a", "b")
    recorded = mesh.seal("a", "b", PING)
    assert answers(mesh.deliver(mesh["b"], recorded, mesh["a"].address)) == 1
    again = [answers(mesh.deliver(mesh["b"], recorded, mesh["a"].address)) for _ in range(5)]
    assert again == ([0] * 5 if defended else [1] * 5)


@pytest.mark.parametrize("defended", [True, False])
def test_case_02_a_replay_after_the_receivers_restart_is_noise(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window is gone with the process; the boot epoch in the key is what remains."""
    if not defended:
        derive = SodiumSuite.pair_key
        monkeypatch.setattr(SodiumSuite, "pair_key", lambda self, g, p, s, r, boot: derive(self, g, p, s, r, 0))
    mesh = settled("a", "b")
    recorded = mesh.seal("a", "b", PING)
    mesh.stop("b")
    mesh.start("b")
    effects = mesh.deliver(mesh["b"], recorded, mesh["a"].address)
    assert answers(effects) == (0 if defended else 1)
    assert (mesh["b"].live.datagrams.drops["forged"] == 1) is defended


@pytest.mark.parametrize("defended", [True, False])
def test_case_02_a_replay_of_the_senders_former_boot_is_dropped(
    defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = settled("a", "b")
    recorded = [mesh.seal("a", "b", PING) for _ in range(3)]
    mesh.stop("a")
    mesh.start("a")
    mesh.run(2.0)
    datagrams = mesh["b"].live.datagrams
    assert datagrams.boot_of(mesh["a"].node_id) == 2
    if not defended:
        monkeypatch.setattr(ReplayWindow, "fresh", lambda self, boot, sequence: True)
        datagrams._boots.clear()
    total = sum(answers(mesh.deliver(mesh["b"], data, mesh["a"].address)) for data in recorded)
    assert total == (0 if defended else 3)


@pytest.mark.parametrize("defended", [True, False])
async def test_case_02_no_boot_is_used_twice(defended: bool, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five starts within a second, the clock set back by an hour and then to 1970: the epoch rises all the same."""
    clock = [1_800_000_000.0] * 5 + [1_799_996_400.0, 0.0]
    if not defended:

        async def forget(self: KeyValue, changes: Any) -> None:
            """A boot that is not made durable."""

        monkeypatch.setattr(KeyValue, "persist", forget)
    boots = []
    for wall in clock:
        monkeypatch.setattr(time, "time", lambda wall=wall: wall)
        async with open_database(data_dir / "boot.db", kernel_migrations(), wall=wall, inline=True) as database:
            boots.append(await founding.next_boot(KeyValue(database)))
    assert (boots == sorted(set(boots))) is defended
    assert boots[0] == 1_800_000_000 - founding.BOOT_ORIGIN


# ---- case 3 ----


@pytest.mark.parametrize("defended", [True, False])
@pytest.mark.parametrize(("boot_step", "sequence"), [(0, 2**48 - 1), (2**31, 5)])
def test_case_03_a_forged_sequence_number_does_not_move_the_window(
    defended: bool, boot_step: int, sequence: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not defended:
        ask = ReplayWindow.fresh

        def fresh(self: ReplayWindow, boot: int, sequence: int) -> bool:
            if not ask(self, boot, sequence):
                return False
            self.commit(boot, sequence)
            return True

        monkeypatch.setattr(ReplayWindow, "fresh", fresh)
    mesh = settled("a", "b")
    mesh_id, sender = by_hand.mesh_bytes(mesh.root.public_key), by_hand.node_bytes(public_key("a"))
    head = by_hand.header(mesh_id, GOSSIP_KEY.key_id, sender, mesh["a"].boot + boot_step, sequence)
    assert mesh.deliver(mesh["b"], head + bytes(60), mesh["a"].address) == []
    assert answers(mesh.tell("a", "b", PING)) == (1 if defended else 0)


# ---- case 4 ----


def alive_again(mesh: Hubs, label: str) -> bytes:
    """The evicted machine helps: a fresh statement of its own, in a later boot."""
    host = mesh[label]
    short = mesh["b"].live.roster.short(host.node_id)
    return statement(label, mesh.root, Alive(short, host.boot + 1, 9, 1, 1, [pack_address(host.address)]))


@pytest.mark.parametrize("defended", [True, False])
def test_case_04_an_evicted_node_gossiped_as_alive_stays_out(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = settled("a", "b", "c", "gone")
    former = dict(mesh["b"].live.roster._by_short)
    mesh.evict("gone", "a", "b", "c")
    mesh.stop("gone")
    assert mesh["gone"].node_id not in mesh["b"].up()
    if not defended:
        # A statement's signer looked up among all that were ever admitted, not among the members.
        _believe_former(monkeypatch, former, public_key("gone"))
    mesh.tell("c", "b", Gossip([alive_again(mesh, "gone")]))
    assert (mesh["gone"].node_id in mesh["b"].up()) is not defended
    assert (mesh["b"].live.codec.drops["not_member"] == 1) is defended


def _believe_former(monkeypatch: pytest.MonkeyPatch, by_short: dict[bytes, Any], key: bytes) -> None:
    def open_any(self: StatementCodec, blob: bytes, *brought: Any) -> Any:
        members, self._roster = self._roster, Former()  # type: ignore[assignment] # the two methods it asks
        try:
            return opened(self, blob, *brought)
        finally:
            self._roster = members

    class Former:
        def node(self, short: bytes) -> Any:
            return by_short.get(short)

        def public_key(self, node_id: Any) -> bytes:
            return key

        def __len__(self) -> int:
            return len(by_short)

    opened = StatementCodec.open
    monkeypatch.setattr(StatementCodec, "open", open_any)


@pytest.mark.parametrize("defended", [True, False])
def test_case_04_an_admission_after_the_tombstone_loses(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root's own admission, kept or even signed anew by mistake, handed over by a third."""
    if not defended:

        def by_time(statement: TrustStatement, data: bytes) -> tuple[bool, int, bytes]:
            at = statement.evicted_at if isinstance(statement, Eviction) else statement.admitted_at
            return (False, at, data)

        monkeypatch.setattr(roster_module, "rank", by_time)
    mesh = settled("a", "b", "gone")
    mesh.evict("gone", "b")
    assert mesh["gone"].node_id not in mesh["b"].live.roster
    mesh["b"].live.roster.apply(mesh.root.admit("gone", at=9_999_999))
    assert (mesh["gone"].node_id in mesh["b"].live.roster) is not defended


def test_case_04_datagrams_and_frames_of_an_evicted_node_change_nothing() -> None:
    mesh = settled("a", "b", "gone")
    recorded = mesh.seal("gone", "b", PING)
    mesh.evict("gone", "b")
    hub = mesh["b"].live
    assert mesh.deliver(mesh["b"], recorded, mesh["gone"].address) == []
    assert mesh.frame("gone", "b", Gossip([])) == []
    assert (hub.datagrams.drops["stranger"], hub.drops["stranger"]) == (1, 1)
