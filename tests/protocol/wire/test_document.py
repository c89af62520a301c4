"""docs/protocol.md against the code: every message with its tag, fields, types and ranges, and every limit.

`python -m tests.protocol.wire.test_document` prints the tables as they should stand in the document.
"""

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import msgspec.inspect
import pytest

from meshnode.cluster.service import pings, twins, wishes
from meshnode.kernel.calls import Granted
from meshnode.llm.service import calls, desk, forwarding, prompts, trialstages
from meshnode.llm.service.weights import contracts
from meshnode.tasks.service import wire as tasks_wire
from protocol.election import messages as election
from protocol.membership import broadcasts, healing, intake, probing, suspicion
from protocol.placement import commands as placing
from protocol.placement import tasks
from protocol.records import messages as records
from protocol.records import record
from protocol.records.events import RecordsParams
from protocol.rpc import messages as rpc
from protocol.sharding import frames as stage_frames
from protocol.sharding import pipelines, sampling
from protocol.trust import join, keys
from protocol.trust import statements as trust
from protocol.wire import announcement, frames, limits, messages
from protocol.wire import statements as wire_statements

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


ORDERS = (pipelines.StageOrder, placing.TaskOrder)


def kind_of(message: type) -> int | None:
    """The kind of the frame that such a message of stages travels in."""
    names = {stage_frames.StageError: "ERROR"}
    name = names.get(message, re.sub(r"(?<!^)(?=[A-Z])", "_", message.__name__).upper())
    kind = stage_frames.Kind.__members__.get(name)
    return kind if message in get_args(stage_frames.Message) else None


TABLES: dict[str, Iterable[type]] = {
    "Datagram messages": get_args(messages.DatagramMessage),
    "Statements": get_args(messages.StatementBody),
    "Channel 0: messages of the machines": get_args(messages.LinkMessage),
    "Channel 1: calls": get_args(rpc.RpcMessage),
    "Channel 2: the link's own messages": get_args(frames.LinkMessage),
    "Models": (
        pipelines.Span,
        pipelines.Pipeline,
        pipelines.EnsureRequest,
        *get_args(pipelines.Answer),
        *get_args(pipelines.StageOrder),
        pipelines.StageCommand,
        pipelines.StageReport,
        pipelines.NodeReport,
    ),
    "Calls between the llm services": (
        calls.Attach,
        Granted,
        prompts.TokeniseRequest,
        prompts.Tokenised,
        desk.StatsRequest,
        desk.SessionsRequest,
        desk.UnloadRequest,
        forwarding.ForwardRequest,
        forwarding.EmbedRequest,
        trialstages.TrialStage,
        trialstages.TrialEnd,
        contracts.ReadRequest,
        contracts.ClaimRequest,
        contracts.ClaimAnswer,
        contracts.WantRequest,
        contracts.WantAnswer,
        contracts.DropRequest,
        contracts.DropAnswer,
    ),
    "Frames of stages": (
        *sorted((kind for kind in get_args(stage_frames.Message) if kind is not stage_frames.Stats), key=kind_of),
        stage_frames.Alternative,
        sampling.Sampling,
        sampling.Grammar,
    ),
    "Calls of the cluster": (
        pings.Echo,
        wishes.AdmitRequest,
        wishes.AdmitAnswer,
        wishes.EvictRequest,
        wishes.LostVoter,
        wishes.RootOffer,
        wishes.Done,
        twins.Copied,
        twins.Heard,
    ),
    "Calls of tasks": (
        placing.Submit,
        placing.Submitted,
        tasks_wire.Hold,
        *get_args(placing.TaskOrder),
        placing.TaskCommand,
        placing.CommandAnswer,
        placing.Note,
        *get_args(placing.NotesCommand),
        placing.NotesAnswer,
        placing.Capacity,
        placing.Lent,
        placing.Running,
        placing.Ended,
        placing.NodeReport,
        tasks_wire.Placed,
        placing.PositionsWanted,
        placing.Position,
        placing.Positions,
        tasks_wire.StatsWanted,
        placing.NodeStats,
        placing.SchedulerStats,
        tasks_wire.OutputWanted,
        tasks_wire.TailWanted,
        tasks_wire.Tail,
        tasks_wire.InputWanted,
        tasks_wire.InputOffered,
    ),
    "Records of tasks": (tasks.Needs, tasks.Order, tasks.Wish, tasks.Attempt),
    "Trust statements": get_args(trust.TrustStatement),
    "Joining": (*get_args(join.FromIssuer), *get_args(join.FromJoiner)),
    "Parts of messages": (election.Version, record.Body, join.Peer, keys.GossipKey),
}

MODULES: tuple[ModuleType, ...] = (
    limits, frames, announcement, rpc, records, record, join, keys, trust, election,
    probing, suspicion, healing, broadcasts, intake, wire_statements, pipelines,
)  # fmt: skip


def power(value: int) -> str:
    """A number as people write it."""
    for exponent in (16, 30, 31, 32, 40, 48, 50, 53, 63):
        if value in (2**exponent, 2**exponent - 1):
            return f"2^{exponent}" if value == 2**exponent else f"2^{exponent} - 1"
    return str(value)


def sized(low: int | None, high: int | None) -> str:
    """A range of lengths."""
    if high is None:
        return ""
    return f" {high}" if low == high else f" {low or 0}..{high}"


def spelled(kind: Any) -> str:
    """A field's type and range in a few words."""
    match type(kind).__name__:
        case "FloatType" if kind.ge is None and kind.gt is None:
            return "float"
        case "FloatType" if kind.gt is not None:
            return f"float above {kind.gt:g}, up to {kind.le:g}"
        case "FloatType":
            return f"float from {kind.ge:g}" if kind.le is None else f"float {kind.ge:g}..{kind.le:g}"
        case "LiteralType":
            return "one of " + ", ".join(kind.values)
        case "EnumType":
            return "one of " + ", ".join(str(one.value) for one in kind.cls)
        case "TupleType":
            return f"({', '.join(spelled(one) for one in kind.item_types)})"
        case "IntType" if kind.lt is not None:
            return f"int {kind.ge}..{power(kind.lt - 1)}"
        case "VarTupleType":
            return f"list{sized(kind.min_length, kind.max_length)} of {spelled(kind.item_type)}"
        case "UnionType" if any(type(one).__name__ == "NoneType" for one in kind.types):
            (one,) = (one for one in kind.types if type(one).__name__ != "NoneType")
            return f"{spelled(one)} or nil"
        case "UnionType" if {one.cls for one in kind.types} in map(set, map(get_args, ORDERS)):
            return "order"
        case "IntType":
            return "int" if kind.le is None else f"int {kind.ge}..{power(kind.le)}"
        case "BytesType":
            return "bytes" + sized(kind.min_length, kind.max_length)
        case "StrType":
            return "text" + sized(kind.min_length, kind.max_length)
        case "ListType":
            return f"list{sized(kind.min_length, kind.max_length)} of {spelled(kind.item_type)}"
        case "DictType":
            size = sized(kind.min_length, kind.max_length)
            return f"map{size} of {spelled(kind.key_type)} to {spelled(kind.value_type)}"
        case "StructType":
            return str(kind.cls.__name__)
        case "UnionType":
            return "datagram message"
        case "BoolType":
            return "bool"
        case other:
            raise AssertionError(other)


def row(message: type) -> str:
    """The table's line on one message."""
    info: Any = msgspec.inspect.type_info(message)
    fields = [
        f"`{field.encode_name}` {spelled(field.type)}" + ("" if field.required else " (optional)")
        for field in info.fields
    ]
    tag = info.tag if info.tag is not None else kind_of(message)
    return f"| {'none' if tag is None else int(tag)} | `{message.__name__}` | {'; '.join(fields) or 'no fields'} |"


def section(title: str) -> str:
    """The text under a heading, up to the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/protocol.md has no heading '{title}'"
    return found[1]


@pytest.mark.parametrize("title", TABLES)
def test_the_tables_of_messages_are_true(title: str) -> None:
    written = re.findall(r"^\| (?:\d+|none) \| `.*\|$", section(title), re.MULTILINE)
    assert written == [row(message) for message in TABLES[title]]


def test_every_message_is_explained_in_words() -> None:
    """A name in the table alone tells nobody what the message is for."""
    prose = "\n".join(line for line in TEXT.splitlines() if not re.match(r"\| (?:\d+|none) \| `", line))
    names = {message.__name__ for kinds in TABLES.values() for message in kinds}
    assert {name for name in names if f"`{name}`" not in prose} == set()


def test_every_call_of_peers_is_in_a_table() -> None:
    """A method that a node answers and the document does not name is a hole in it."""
    sources = [*(ROOT / "meshnode").glob("*/peers*"), *(ROOT / "meshnode").glob("*/peers/*.py")]
    texts = [source.read_text(encoding="utf-8") for source in sources if source.is_file()]
    named = {name for text in texts for name in re.findall(r'"([a-z.]+\.[a-z_]+)": PeerMethod', text)}
    methods = named | {forwarding.FORWARD, forwarding.EMBED}
    written = set(re.findall(r"^\| `((?:llm|cluster|tasks)\.[a-z_.]+)` \|", TEXT, re.MULTILINE))
    assert len(named) > 15
    assert written == methods


def constants() -> dict[str, int | float]:
    """Every number that these modules name, by that name."""
    found: dict[str, int | float] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if name.isupper() and not name.startswith("_") and isinstance(value, int | float):
                assert found.setdefault(name, value) == value, f"{name} means two things"
    return found


def test_the_table_of_limits_is_true() -> None:
    rows = re.findall(r"^\| `([A-Z_0-9]+)` \| ([0-9^ .-]+) \|", section("Limits"), re.MULTILINE)
    written = {name: value.strip() for name, value in rows}
    known = constants()
    assert len(rows) == len(written)
    assert {name: value for name, value in written.items() if value != number(known.get(name))} == {}
    own = {name for name, value in vars(limits).items() if name.isupper() and isinstance(value, int)}
    assert own - written.keys() == set()


def test_the_table_of_what_records_bound_is_true() -> None:
    """All bounds of the defaults, and the times that go with offences."""
    written = dict(re.findall(r"^\| `([a-z_]+)` \| ([0-9^ .-]+) \|", section("Limits"), re.MULTILINE))
    defaults = {field.name: field.default for field in fields(RecordsParams)}
    assert {name: value for name, value in written.items() if value != number(defaults.get(name))} == {}
    bounds = {name for name in defaults if re.search(r"_max$|_per_s$", name)}
    assert bounds - written.keys() == set()


def number(value: int | float | None) -> str:
    """A limit as the table writes it."""
    if value is None:
        return "no such constant"
    return power(value) if isinstance(value, int) else f"{value:g}"


if __name__ == "__main__":
    for title, kinds in TABLES.items():
        print(f"\n### {title}\n\n| tag | message | fields |\n|---|---|---|")
        print("\n".join(row(message) for message in kinds))
    print("\n### Limits\n")
    print("\n".join(f"| `{name}` | {number(value)} |" for name, value in constants().items()))
