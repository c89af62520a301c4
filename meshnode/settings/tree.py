"""The settings themselves: one struct for each section, each field with its type, bounds, default, unit and meaning.

This file is the single list that validation, `meshnode config`, the environment's names and docs/settings.md are made
from. It leaves reading and merging to `resolve`.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct


def _doc(text: str, unit: str = "", *, secret: bool = False, **bounds: Any) -> Meta:
    return Meta(description=text, extra={"unit": unit, "secret": secret}, **bounds)


_WORD = r"^\S+$"
_ORIGIN = r"^https?://[^/\s]+$"
_Word = Annotated[str, Meta(pattern=_WORD)]
_Origin = Annotated[str, Meta(pattern=_ORIGIN)]
_Positive = Annotated[float, Meta(gt=0, le=86_400)]
_Count = Annotated[int, Meta(ge=1, le=1_000)]

Port = Annotated[int, Meta(ge=0, le=65_535)]


class NodeSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Who this node is on this machine."""

    name: Annotated[
        str, _doc("Name shown to people; spaces and emoji are fine. Empty: the machine's host name.", max_length=255)
    ] = ""
    data_dir: Annotated[
        str, _doc("Folder for keys, database and logs. Empty: the usual place of the operating system.")
    ] = ""


class ApiSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The local API, which is only ever bound to this machine's loopback addresses."""

    port: Annotated[Port, _doc("Port on 127.0.0.1 and ::1. 0: any free one.")] = 4892
    require_token: Annotated[
        bool, _doc("Ask the agent's own user for the token too, as for every other user of this machine.")
    ] = False
    allowed_origins: Annotated[
        tuple[_Origin, ...], _doc("Web origins, such as https://chat.example, whose pages may call this API.")
    ] = ()
    header_deadline_s: Annotated[
        float, _doc("From the first byte of a request to the end of its headers.", "s", gt=0, le=600)
    ] = 8.0
    body_grace_s: Annotated[
        float, _doc("How long a body may take whatever its size; slow but steady ones get more.", "s", gt=0, le=600)
    ] = 6.0
    send_deadline_s: Annotated[
        float, _doc("A reader that takes nothing for so long is disconnected.", "s", gt=0, le=600)
    ] = 8.0
    body_bytes_max: Annotated[
        int, _doc("Largest body of a request to a route that names no limit of its own.", "B", ge=1024)
    ] = 1024 * 1024
    connections_max: Annotated[int, _doc("Connections open at once; more are refused.", ge=1, le=65_536)] = 1_024
    requests_max: Annotated[
        int, _doc("Requests worked on at once, event streams aside; more are refused.", ge=1, le=65_536)
    ] = 128
    streams_max: Annotated[int, _doc("Event streams open at once; more are refused.", ge=1, le=65_536)] = 512
    rate_per_s: Annotated[float, _doc("Requests a second that one caller may make on average.", "1/s", gt=0)] = 5_000.0
    rate_burst: Annotated[int, _doc("Requests that one caller may make at once above that rate.", ge=1)] = 10_000
    log_requests: Annotated[bool, _doc("Write one log record for each request.")] = False


class PeerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The links between nodes: mutual TLS over TCP, gossip over UDP, both on one port."""

    host: Annotated[str, _doc("Address to listen on. Empty: all addresses of this machine, IPv4 and IPv6.")] = ""
    port: Annotated[Port, _doc("TCP and UDP port for other nodes; open it in the firewall. 0: any free one.")] = 4893
    advertise: Annotated[
        tuple[_Word, ...],
        _doc("Addresses told to other nodes besides those of the network cards: HOST, HOST:PORT or [IPV6]:PORT."),
    ] = ()
    link_idle_s: Annotated[
        float, _doc("A control link that carried nothing for so long is closed.", "s", ge=1, le=86_400)
    ] = 60.0


class OnboardingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The listener for nodes that join; open only while an invitation is valid."""

    host: Annotated[str, _doc("Address to listen on. Empty: all addresses of this machine.")] = ""
    port: Annotated[Port, _doc("TCP port of the join page and the join itself. 0: any free one.")] = 4894
    token_ttl_s: Annotated[
        float, _doc("How long an invitation is valid when nothing else is asked for.", "s", ge=10, le=7 * 86_400)
    ] = 600.0
    arrival_s: Annotated[
        float,
        _doc("A machine that was admitted and is not heard of for so long is a member no more.", "s", ge=1, le=86_400),
    ] = 900.0


class MembershipSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How fast nodes notice that another is gone. The profile sets all numbers; each can be set apart."""

    profile: Annotated[
        Literal["lan", "wan", "local"],
        _doc("lan: one network; wan: round trips up to 300 ms; local: many agents on one machine."),
    ] = "lan"
    probe_interval_s: Annotated[_Positive | None, _doc("One peer is probed each such interval.", "s")] = None
    direct_timeout_s: Annotated[_Positive | None, _doc("Without an answer for so long, relays are asked.", "s")] = None
    relay_timeout_s: Annotated[_Positive | None, _doc("So long after the probe began, the link is tried.", "s")] = None
    probe_timeout_s: Annotated[
        _Positive | None, _doc("So long after the probe began, the silent peer is accused.", "s")
    ] = None
    relays: Annotated[_Count | None, _doc("How many others are asked to probe a silent peer.")] = None
    gossip_interval_s: Annotated[_Positive | None, _doc("News is passed on once in each such interval.", "s")] = None
    gossip_fanout: Annotated[_Count | None, _doc("To how many peers news is passed on in each interval.")] = None
    suspicion_floor_s: Annotated[
        _Positive | None, _doc("The time that an accused node has to show that it lives.", "s")
    ] = None
    witnesses_max: Annotated[
        _Count | None, _doc("So many distinct accusers are needed at most to declare a node dead.")
    ] = None


class DiscoverySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Finding nodes of the own mesh on the local network; it admits nobody."""

    multicast: Annotated[bool, _doc("Announce this mesh on the local network, and listen for it.")] = True
    group: Annotated[_Word, _doc("IPv4 multicast group of the announcements.")] = "239.255.48.93"
    group_ipv6: Annotated[_Word, _doc("IPv6 multicast group of the announcements.")] = "ff02::4893"
    port: Annotated[int, _doc("UDP port of the announcements, the same on all nodes.", ge=1, le=65_535)] = 4895


class HeartbeatSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What this node tells about its load and devices."""

    budget_bytes_per_s: Annotated[
        int, _doc("Resource records that a node receives at most, at any mesh size.", "B/s", ge=100, le=1_000_000)
    ] = 1_500
    sample_interval_s: Annotated[
        float, _doc("How often load, memory, disks and devices are read.", "s", ge=0.1, le=3_600)
    ] = 1.0


class LlmSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Large language models: what this node lends to the mesh, and where it keeps and fetches them."""

    lend: Annotated[bool, _doc("Compute layers of models on this node. It needs the `llm` extra.")] = True
    models_dir: Annotated[str, _doc("Folder for models. Empty: `models` in the data folder.")] = ""
    disk_bytes_max: Annotated[int, _doc("What models may take on this disk. 0: all but a tenth of it.", "B", ge=0)] = 0
    memory_bytes_max: Annotated[
        int, _doc("Main memory that models may take. 0: what is free, less an eighth of the machine's.", "B", ge=0)
    ] = 0
    gpu_bytes_max: Annotated[
        int, _doc("Memory of graphics devices that models may take. 0: what is free, less a tenth.", "B", ge=0)
    ] = 0
    threads: Annotated[int, _doc("Cores that models may use. 0: all.", ge=0, le=1_024)] = 0
    slots: Annotated[int, _doc("Generations that one loaded model runs at once; more wait.", ge=1, le=64)] = 4
    context: Annotated[
        int, _doc("Tokens of context of each slot of a loaded model; longer requests load it anew. 0: 4,096.", ge=0)
    ] = 0
    stages_min: Annotated[
        int, _doc("As coordinator, split every model over at least so many nodes: for trials.", ge=1, le=64)
    ] = 1
    keep_alive_s: Annotated[
        float, _doc("A model that was not used for so long is unloaded, unless it is pinned.", "s", ge=0, le=31_536_000)
    ] = 1_800.0
    pinned: Annotated[tuple[_Word, ...], _doc("Models that this node has the mesh load at once, and keep.")] = ()
    aliases: Annotated[tuple[_Word, ...], _doc("Other names for models, each ALIAS=MODEL.")] = ()
    default_model: Annotated[str, _doc("What `auto` means. Empty: the best model that is ready.")] = ""
    upstreams: Annotated[
        tuple[_Word, ...], _doc("OpenAI-compatible servers that this node reaches for the mesh, each NAME=URL.")
    ] = ()
    upstream_keys: Annotated[tuple[_Word, ...], _doc("Keys for them, each NAME=KEY.", secret=True)] = ()
    hub_url: Annotated[_Origin, _doc("Where `hf:` references are fetched from.")] = "https://huggingface.co"
    hub_token: Annotated[str, _doc("Token for downloads that need one. It goes to `hub_url` alone.", secret=True)] = ""


class TaskSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Tasks of the mesh: whose this node takes, when, and how much it lends them."""

    accept: Annotated[
        Literal["nobody", "admins", "everyone"],
        _doc("Whose tasks run on this node: those submitted on no node, on admins, on any member."),
    ] = "everyone"
    slots: Annotated[int, _doc("Tasks that run here at once. 0: as many as this machine has cores.", ge=0, le=256)] = 0
    cpus: Annotated[float, _doc("Cores that tasks may take together. 0: all.", ge=0, le=4_096)] = 0.0
    memory_bytes_max: Annotated[
        int,
        _doc("Main memory that tasks may take together. 0: what is free, less an eighth of the machine's.", "B", ge=0),
    ] = 0
    disk_bytes_max: Annotated[
        int, _doc("Room for scratch folders and outputs together. 0: half of what is free.", "B", ge=0)
    ] = 0
    hours: Annotated[
        str,
        _doc("When tasks may start, by this machine's clock, such as 22:00-06:30. Empty: always.",
             pattern=r"^$|^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$"),
    ] = ""  # fmt: skip
    on_battery: Annotated[bool, _doc("Start tasks also while this machine runs on its battery.")] = False
    isolation: Annotated[
        Literal["bubblewrap", "none"],
        _doc(
            "How tasks are shut in. `none` lets them do whatever this agent may: only for machines that hold nothing."
        ),
    ] = "bubblewrap"
    network: Annotated[bool, _doc("Let tasks that ask for it use the network.")] = False
    labels: Annotated[
        tuple[_Word, ...], _doc("What this machine is, for tasks that ask for it, such as fast-disk.")
    ] = ()
    output_bytes_max: Annotated[
        int, _doc("What is kept of each stream of a task's output, half from its head.", "B", ge=4_096, le=1024**3)
    ] = 16 * 1024 * 1024
    input_bytes_max: Annotated[
        int,
        _doc("The largest input of a task that is taken in here, from callers or other nodes.", "B",
             ge=16_384, le=1024**4),
    ] = 1024**3  # fmt: skip
    keep_s: Annotated[
        float, _doc("How long output and large inputs are kept after a task's end.", "s", ge=0, le=31_536_000)
    ] = 7 * 86_400.0
    history_s: Annotated[
        float, _doc("How long ended tasks that were submitted here stay in the lists.", "s", ge=60, le=31_536_000)
    ] = 30 * 86_400.0


class LogSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What is written to standard error and to the log files in the data folder."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], _doc("The least important records that are written.")
    ] = "info"
    format: Annotated[
        Literal["text", "json"], _doc("Form on standard error; the files always hold one JSON object a line.")
    ] = "text"
    file_bytes_max: Annotated[
        int, _doc("At this size a log file is put aside and a new one begun.", "B", ge=65_536)
    ] = 8 * 1024 * 1024
    files_kept: Annotated[int, _doc("How many log files are kept, the oldest goes first.", ge=1, le=1_000)] = 4


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of one agent. Made by `load_settings`; never changed afterwards."""

    node: NodeSettings = NodeSettings()
    api: ApiSettings = ApiSettings()
    peers: PeerSettings = PeerSettings()
    onboarding: OnboardingSettings = OnboardingSettings()
    membership: MembershipSettings = MembershipSettings()
    discovery: DiscoverySettings = DiscoverySettings()
    heartbeats: HeartbeatSettings = HeartbeatSettings()
    llm: LlmSettings = LlmSettings()
    tasks: TaskSettings = TaskSettings()
    log: LogSettings = LogSettings()
