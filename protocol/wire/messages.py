"""Every typed message of the wire: datagrams, signed statements and the machines' link messages, on one page.

Arrays, not maps (`array_like`), with an integer tag first; unknown trailing fields are ignored by older readers, so a
later version may append. Election and records define theirs beside their machines and are joined to the unions here.
"""

from typing import Annotated

import msgspec

from protocol.election.messages import Beacon, ElectorateOffer, ElectorateRequest, Follow
from protocol.records.messages import RecordMessage
from protocol.wire import limits

Short = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
Boot = Annotated[int, msgspec.Meta(ge=0, le=limits.BOOT_MAX)]
Counter = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Probe = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Digest = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
Statement = Annotated[bytes, msgspec.Meta(max_length=limits.STATEMENT_BYTES_MAX)]


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What all messages share: frozen, spelled as an array, outside the garbage collector's care."""


# ---- datagrams: sender is proven by the pairwise key, so nothing here names it ------------------------------------


class Ping(Message, frozen=True, tag=1):
    """Are you there? `digest` sums up the sender's view, so that two views that differ are noticed by accident."""

    probe: Probe
    digest: Digest


class Ack(Message, frozen=True, tag=2):
    """I am. Answers the Ping with the same probe number."""

    probe: Probe
    digest: Digest


class PingRequest(Message, frozen=True, tag=3):
    """Please ping `target` for me (SWIM's indirect probe)."""

    probe: Probe
    target: Short


class Relayed(Message, frozen=True, tag=4):
    """The target of your PingRequest answered me."""

    probe: Probe


class Nack(Message, frozen=True, tag=5):
    """I am alive and your target did not answer me (Lifeguard): the asker learns that it is not itself cut off."""

    probe: Probe


class Gossip(Message, frozen=True, tag=6):
    """Signed statements by anyone, passed on."""

    items: Annotated[list[Statement], msgspec.Meta(max_length=limits.STATEMENTS_PER_GOSSIP_MAX)]


class Spread(Message, frozen=True, tag=7):
    """Heartbeats on their way down the tree whose root is `root`; the receiver passes them to its own children."""

    root: Short
    items: Annotated[list[Statement], msgspec.Meta(max_length=limits.STATEMENTS_PER_GOSSIP_MAX)]


DatagramMessage = Ping | Ack | PingRequest | Relayed | Nack | Gossip | Spread | Beacon | Follow

# ---- statements: signed by whom they speak for, relayed by anyone ---------------------------------------------------


class Alive(Message, frozen=True, tag=1):
    """I exist, in this boot; a higher incarnation overrules what was said about a lower one."""

    signer: Short
    boot: Boot
    incarnation: Counter
    version_min: Annotated[int, msgspec.Meta(ge=0, le=255)]
    version_max: Annotated[int, msgspec.Meta(ge=0, le=255)]
    addresses: Annotated[
        list[Annotated[bytes, msgspec.Meta(min_length=6, max_length=18)]],
        msgspec.Meta(max_length=limits.ADDRESSES_PER_NODE_MAX),
    ]


class Accusation(Message, frozen=True, tag=2):
    """I probed `target` and it did not answer, and I was in touch with others meanwhile. One witness, not a verdict."""

    signer: Short
    boot: Boot
    number: Counter
    target: Short
    target_boot: Boot
    target_incarnation: Counter


class Leaving(Message, frozen=True, tag=3):
    """I am going, on purpose; nobody needs to suspect me."""

    signer: Short
    boot: Boot
    incarnation: Counter


class ViewReport(Message, frozen=True, tag=4):
    """Whom I take to be up: one bit per roster member in the order of short ids, least significant bit first."""

    signer: Short
    boot: Boot
    number: Counter
    roster: Digest
    up: Annotated[bytes, msgspec.Meta(max_length=limits.ROSTER_MAX // 8)]


class Heartbeat(Message, frozen=True, tag=5):
    """My resources now, sizes in MiB; what never changes is in the node's profile record.

    -1 where a figure does not exist, -128 for a temperature.
    """

    signer: Short
    boot: Boot
    number: Counter
    period_ds: Annotated[
        int, msgspec.Meta(ge=0, le=65535)
    ]  # tenths of a second until the next one, so readers know stale
    cpu_pm: Annotated[int, msgspec.Meta(ge=0, le=1000)]  # per mille of the whole machine
    load_c: Annotated[int, msgspec.Meta(ge=0, le=2**31)]  # one-minute load average in hundredths
    ram_used_mb: Counter
    storage_used_mb: Counter
    vram_free_mb: Annotated[int, msgspec.Meta(ge=-1, le=2**40)]
    gpu_temp_c: Annotated[int, msgspec.Meta(ge=-128, le=255)]
    gpu_busy_pm: Annotated[int, msgspec.Meta(ge=-1, le=1000)]
    flags: Annotated[int, msgspec.Meta(ge=0, le=2**31)]  # HeartbeatFlag bits: on battery, throttled, draining ...
    battery_pct: Annotated[int, msgspec.Meta(ge=-1, le=100)]
    slots_free: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    uptime_s: Counter
    rtt_us: Annotated[int, msgspec.Meta(ge=-1, le=2**31)]  # median round trip to the peers probed lately
    follows: Short  # the coordinator followed
    term: Counter


StatementBody = Alive | Accusation | Leaving | ViewReport | Heartbeat

# ---- link messages of the machines (channel 0 of a control link) ----------------------------------------------------

Statements = Annotated[list[Statement], msgspec.Meta(max_length=limits.ROSTER_MAX)]


class ViewOffer(Message, frozen=True, tag=1):
    """4 bytes of digest per roster member in the order of short ids: what I believe of each. Answered by ViewReply."""

    roster: Digest
    entries: Annotated[bytes, msgspec.Meta(max_length=4 * limits.ROSTER_MAX)]


class ViewReply(Message, frozen=True, tag=2):
    """My statements on the members where we differ; `wanted` asks for yours on those where I know less."""

    statements: Statements
    wanted: Annotated[list[Short], msgspec.Meta(max_length=limits.ROSTER_MAX)]


class Tunnel(Message, frozen=True, tag=3):
    """Datagram messages over the link, for a peer whose UDP does not get through (a firewall, a captive network)."""

    messages: Annotated[list[DatagramMessage], msgspec.Meta(max_length=limits.MESSAGES_PER_DATAGRAM_MAX)]


class KeyRequest(Message, frozen=True, tag=48):
    """I met a datagram under a gossip key that I lack (its first 4 bytes of hash): please send what you have."""

    key_id: Annotated[bytes, msgspec.Meta(min_length=4, max_length=4)]


class KeyGrant(Message, frozen=True, tag=49):
    """A gossip key; never sent but over a link to a member."""

    epoch: Counter
    key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    minted_by: Short


LinkMessage = (
    ViewOffer | ViewReply | Tunnel | ElectorateOffer | ElectorateRequest | RecordMessage | KeyRequest | KeyGrant
)
