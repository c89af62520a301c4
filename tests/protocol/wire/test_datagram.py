"""The datagram codec: what opens, what is refused and by which name, and that nothing changes before verification."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import Address
from protocol.trust.roster import Roster
from protocol.wire import limits
from protocol.wire.datagram import DatagramCodec, Opened, UnknownKey
from protocol.wire.messages import Ack, Ping
from protocol.wire.replay import ReplayWindow
from tests.golden.wire_vectors import GOSSIP, Keys
from tests.protocol.trust.parts import Root, node, public_key, seed
from tests.protocol.wire import by_hand
from tests.protocol.wire.hubs import suite

ROOT = Root()
SOURCE = Address("10.0.0.9", 4893)
PING = Ping(7, b"12345678")
KEY_ID = by_hand.key_id(GOSSIP)


def codec(label: str, *, boot: int = 5, root: Root = ROOT, keys: Any = None) -> DatagramCodec:
    """The codec of a member of a mesh of a, b and c."""
    roster = Roster(
        root_public_key=root.public_key, verifier=root.verifier, statements=[root.admit(name) for name in "abc"]
    )
    return DatagramCodec(
        me=node(label), boot=boot, mesh_id=root.mesh_id, suite=suite(label, root), roster=roster, keys=keys or Keys()
    )


def pair(boot: int = 5, receiver_boot: int = 5) -> tuple[DatagramCodec, DatagramCodec]:
    """a, which knows b's boot, and b."""
    a, b = codec("a", boot=boot), codec("b", boot=receiver_boot)
    a.learn_boot(node("b"), receiver_boot)
    return a, b


def sealed(a: DatagramCodec, *messages: object) -> bytes:
    data = a.seal(node("b"), messages or (PING,))
    assert data is not None
    return data


# ---- what opens ----


def test_what_was_sealed_opens_once() -> None:
    a, b = pair()
    data = sealed(a, PING, Ack(8, bytes(8)))
    assert b.open(data, SOURCE) == Opened(node("a"), 5, [PING, Ack(8, bytes(8))])
    assert b.open(data, SOURCE) is None
    assert b.drops == {"replay": 1}
    assert b.boot_of(node("a")) == 5


def test_a_full_datagram_has_1200_bytes_and_one_more_is_our_mistake() -> None:
    a, b = pair()
    room = limits.DATAGRAM_BODY_BYTES_MAX - 1  # one byte for the array that holds the messages
    filler: list[Any] = [5, 1, b"x" * (room - 6)]  # a Nack with a field that no version knows yet
    data = sealed(a, filler)
    assert len(data) == limits.DATAGRAM_BYTES_MAX
    assert isinstance(b.open(data, SOURCE), Opened)
    with pytest.raises(ValueError, match="do not fit"):
        a.seal(node("b"), [[5, 1, b"x" * (room - 5)]])


def test_without_the_receivers_boot_nothing_is_sealed() -> None:
    a, _ = pair()
    assert a.seal(node("c"), [PING]) is None
    assert a.seal(node("nobody"), [PING]) is None
    assert a.drops == {"unsendable": 2}


# ---- what is refused, by name ----


def altered(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


def test_each_refusal_is_counted_under_its_name() -> None:
    a, b = pair()
    data = sealed(a)
    other_root = Root("another root")
    other = codec("a", root=other_root)
    other.learn_boot(node("b"), 5)
    stranger = by_hand.header(by_hand.mesh_bytes(ROOT.public_key), KEY_ID, b"x" * 20, 5, 1) + bytes(40)
    own = by_hand.header(
        by_hand.mesh_bytes(ROOT.public_key), KEY_ID, by_hand.node_bytes(public_key("b")), 5, 1
    ) + bytes(40)
    cases = [
        ("size", b""),
        ("size", data[: limits.DATAGRAM_OVERHEAD_BYTES]),
        ("size", data + bytes(1200)),
        ("other_mesh", sealed(other)),
        ("version", altered(data, 0, 2)),
        ("stranger", stranger),
        ("stranger", own),
        ("forged", altered(data, len(data) - 1, data[-1] ^ 1)),
        ("forged", altered(data, 30, data[30] ^ 1)),
        ("forged", altered(data, 26, data[26] ^ 64)),
        ("forged", data + b"\0"),
        ("replay", altered(data, 17, 0)[:20] + b"\4" + data[21:]),
        ("malformed", sealed(a, [99, 1])),
        ("malformed", sealed(a, [1, -5, bytes(8)])),
        ("malformed", sealed(a, *[[5, 1]] * 17)),
    ]
    b.learn_boot(node("a"), 5)
    for name, datagram in cases:
        before = b.drops[name]
        assert b.open(datagram, SOURCE) is None, name
        assert b.drops[name] == before + 1, (name, b.drops)
    assert isinstance(b.open(data, SOURCE), Opened)


def test_a_later_version_is_noted_and_nothing_else() -> None:
    a, b = pair()
    assert b.open(altered(sealed(a), 0, 9), SOURCE) is None
    assert b.version_seen == {node("a"): 9}
    assert b.boot_of(node("a")) is None


def test_an_unknown_key_is_named_and_nothing_is_believed() -> None:
    class Other:
        def sending(self) -> tuple[bytes, bytes]:
            return by_hand.key_id(seed("other")), seed("other")

        def receiving(self, key_id: bytes) -> bytes | None:
            return None

    a, b = codec("a", keys=Other()), codec("b")
    a.learn_boot(node("b"), 5)
    assert b.open(sealed(a), SOURCE) == UnknownKey(node("a"), by_hand.key_id(seed("other")), SOURCE)
    assert b.boot_of(node("a")) is None
    assert b.drops == {"unknown_key": 1}


def test_the_wrong_receiver_the_other_direction_and_a_former_boot_are_noise() -> None:
    a, b = pair()
    data = sealed(a)
    assert codec("c").open(data, SOURCE) is None
    assert codec("b", boot=6).open(data, SOURCE) is None
    back = codec("b")
    back.learn_boot(node("a"), 5)
    reflected = data[:9] + by_hand.node_bytes(public_key("b"))[:8] + data[17:]
    assert a.open(reflected, SOURCE) is None
    assert a.drops == {"forged": 1}
    assert isinstance(b.open(data, SOURCE), Opened)


def test_nothing_changes_before_verification() -> None:
    a, b = pair()
    first = sealed(a)
    for boot, sequence in ((5, 2**48 - 1), (2**32 - 1, 1), (6, 1)):
        head = by_hand.header(
            by_hand.mesh_bytes(ROOT.public_key), KEY_ID, by_hand.node_bytes(public_key("a")), boot, sequence
        )
        assert b.open(head + bytes(50), SOURCE) is None
    assert b.drops == {"forged": 3}
    assert b.boot_of(node("a")) is None
    assert isinstance(b.open(first, SOURCE), Opened)


def test_boots_rise_and_forgetting_forgets() -> None:
    a, b = pair(boot=5)
    old = sealed(a)
    later = codec("a", boot=6)
    later.learn_boot(node("b"), 5)
    assert isinstance(b.open(sealed(later), SOURCE), Opened)
    assert b.open(old, SOURCE) is None
    b.learn_boot(node("a"), 4)
    assert b.boot_of(node("a")) == 6
    b.learn_boot(node("a"), 9)
    assert b.boot_of(node("a")) == 9
    b.forget(node("a"))
    assert b.boot_of(node("a")) is None
    assert b.seal(node("a"), [PING]) is None


def test_a_receivers_restart_needs_a_new_key() -> None:
    a, _ = pair()
    restarted = codec("b", boot=6)
    assert restarted.open(sealed(a), SOURCE) is None
    a.learn_boot(node("b"), 6)
    assert isinstance(restarted.open(sealed(a), SOURCE), Opened)


def test_seeded_mutations_never_raise_and_never_pass() -> None:
    chance = random.Random(3)
    a, b = pair()
    for _ in range(5_000):
        data = bytearray(sealed(a))
        match chance.randrange(4):
            case 0:
                for _ in range(chance.randrange(1, 4)):
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                del data[chance.randrange(1, len(data)) :]
            case 2:
                data += chance.randbytes(chance.randrange(1, 1300))
            case _:
                data[:] = chance.randbytes(chance.randrange(1300))
        result = b.open(bytes(data), SOURCE)
        # Two flips of one bit undo each other; anything that opens must be what was sealed.
        assert result is None or isinstance(result, UnknownKey) or result.messages == [PING]
    assert {"forged", "size"} < set(b.drops)


@given(st.binary(max_size=1300))
def test_any_body_a_member_may_seal_is_refused_or_read(body: bytes) -> None:
    a, b = pair()
    shared = by_hand.Identity(seed("a")).shared_with(public_key("b"))
    ids = [by_hand.node_bytes(public_key(label)) for label in ("a", "b")]
    key = by_hand.pair_key(GOSSIP, shared, ids[0], ids[1], 5)
    head = by_hand.header(by_hand.mesh_bytes(ROOT.public_key), KEY_ID, ids[0], 5, 1)
    result = b.open(by_hand.seal(key, head, body), SOURCE)
    assert result is None or isinstance(result, Opened)
    assert a.drops == {}


# ---- the window ----

WIDE = limits.REPLAY_WINDOW


@pytest.mark.parametrize(
    ("taken", "asked", "fresh"),
    [
        ([], (0, 0), True),
        ([(1, 5)], (1, 5), False),
        ([(1, 5)], (1, 6), True),
        ([(1, 5)], (1, 4), True),
        ([(1, 5), (1, 9)], (1, 5), False),
        ([(1, WIDE)], (1, 1), True),
        ([(1, WIDE)], (1, 0), False),
        ([(1, 5), (1, 5 + WIDE - 1)], (1, 5), False),
        ([(1, 5), (1, 5 + WIDE)], (1, 5), False),
        ([(1, 5), (1, 10 * WIDE)], (1, 10 * WIDE - 1), True),
        ([(1, 5), (2, 1)], (1, 6), False),
        ([(1, 5), (2, 1)], (2, 5), True),
        ([(1, limits.SEQUENCE_MAX)], (1, limits.SEQUENCE_MAX), False),
        ([(1, limits.SEQUENCE_MAX)], (2, 0), True),
        ([(limits.BOOT_MAX, 0)], (limits.BOOT_MAX, 0), False),
    ],
)
def test_the_window(taken: list[tuple[int, int]], asked: tuple[int, int], fresh: bool) -> None:
    window = ReplayWindow()
    for boot, sequence in taken:
        assert window.fresh(boot, sequence)
        window.commit(boot, sequence)
    assert window.fresh(*asked) is fresh
    assert window.fresh(*asked) is fresh, "asking changes nothing"


class Model:
    """The same as a set of everything ever taken."""

    def __init__(self) -> None:
        self.taken: set[tuple[int, int]] = set()
        self.boot = 0
        self.highest = -1

    def fresh(self, boot: int, sequence: int) -> bool:
        if boot != self.boot:
            return boot > self.boot
        return (boot, sequence) not in self.taken and sequence > self.highest - WIDE

    def commit(self, boot: int, sequence: int) -> None:
        if boot > self.boot:
            self.boot, self.highest = boot, -1
        self.taken.add((boot, sequence))
        self.highest = max(self.highest, sequence)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.one_of(st.integers(0, 3 * WIDE), st.integers(0, limits.SEQUENCE_MAX))),
        max_size=60,
    )
)
def test_the_window_is_the_model(pairs: list[tuple[int, int]]) -> None:
    window, model = ReplayWindow(), Model()
    for boot, sequence in pairs:
        assert window.fresh(boot, sequence) == model.fresh(boot, sequence)
        if model.fresh(boot, sequence):
            window.commit(boot, sequence)
            model.commit(boot, sequence)
    assert window._seen < 1 << WIDE
