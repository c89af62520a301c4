"""A flood against a mesh of three: of junk datagrams at one agent that has one core, or of a member's valid statements
at all of them. Does anybody notice?

The junk knows everything that can be seen on the wire: the mesh's tag, the key's id, a member's short id and boot. The
member (flooding_member.py) has joined as any other.
"""

import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import apsw
import msgspec
import psutil

from meshnode.cluster.service.switch import DATABASE_FILE
from protocol.ids import MeshId, NodeId, short_id
from protocol.wire.datagram import mesh_tag
from scripts.benchmarks.agents import ROOT, BenchmarkError, LocalAgent, LocalMesh, invite, until
from scripts.benchmarks.api_load import split_cores
from scripts.benchmarks.figures import Figure, Outcome, figure, quantile
from scripts.benchmarks.flooding_member import PER_DATAGRAM, Order, Sent
from scripts.benchmarks.footprint import cost
from scripts.benchmarks.watching import Streams, node_in

RATE_PER_S: Final = 50_000.0
PING_MS_MAX: Final = 50.0
SENT_SHARE_MIN: Final = 0.99  # the senders themselves do not hit the rate exactly
SENDERS: Final = 2
SAMPLES: Final = 4_000
SETTLE_S: Final = 5.0
AFTERMATH_S: Final = 5.0
MEMBER_SECONDS_MAX: Final = 30.0
MEMBER_MESSAGES_MAX: Final = 200_000
BY_MEMBER: Final = {
    "packets": Order("packets", 6_000.0, 0.0, PER_DATAGRAM),
    "tunnels": Order("tunnels", 6_000.0, 0.0, PER_DATAGRAM),
    "links": Order("links", 60.0, 0.0, 200),
}
"""What a member sends, by its way: messages a second to all together, and statements in each. Over links that is a
quarter more than the 3,200 statements a second that are taken in of it."""

KINDS: Final = ("random", "other mesh", "other version", "stranger", "old boot", "unknown key", "forged")


def datagrams(mesh_id: str, sender: str, boot: int, key_id: bytes, chance: random.Random) -> list[bytes]:
    """`SAMPLES` datagrams, of all kinds in turn."""
    tag, short = mesh_tag(MeshId(mesh_id)), short_id(NodeId(sender))

    def one(kind: str) -> bytes:
        body = chance.randbytes(chance.randint(40, 1170))
        if kind == "random":
            return body
        version, mesh, key, node, epoch = 1, tag, key_id, bytes(short), boot
        match kind:
            case "other mesh":
                mesh = chance.randbytes(4)
            case "other version":
                version = 9
            case "stranger":
                node = chance.randbytes(8)
            case "old boot":
                epoch = 1
            case "unknown key":
                key = chance.randbytes(4)
        sequence = chance.getrandbits(32)
        return struct.pack(">B4s4s8sIHI", version, mesh, key, node, epoch, 0, sequence) + body

    return [one(KINDS[number % len(KINDS)]) for number in range(SAMPLES)]


def junk(*, seconds: float = 10.0, rate: float = RATE_PER_S, seed: int = 1, member: str = "") -> Outcome:
    """A mesh of three under a flood of junk, or of a member (--member: packets, tunnels, links), beside it in peace."""
    if member:
        return _member(member, seconds)
    served, others = split_cores()
    with LocalMesh() as mesh:
        victim = mesh.add(cores=served)
        victim.start()
        for _ in range(2):
            mesh.add(cores=others).start(invite(victim))
        mesh.wait_all_online()
        time.sleep(SETTLE_S)
        witness = mesh.agents[1]
        boot = node_in(victim.ask("GET", "/api/nodes"), witness.node_id)["boot"]
        forged = datagrams(victim.mesh_id, witness.node_id, boot, key_id_of(victim.folder), random.Random(seed))
        with Streams(mesh.agents, ["node_suspect", "node_offline"]) as streams:
            calm = _observed(victim, witness, seconds)
            senders = [_sender(victim.peer_port, rate / SENDERS, seconds, forged, others) for _ in range(SENDERS)]
            lost_before = kernel_drops(victim.peer_port)
            flooded = _observed(victim, witness, seconds)
            sent = sum(_sent(process) for process in senders)
            time.sleep(AFTERMATH_S)
            lost = kernel_drops(victim.peer_port) - lost_before
            alarms = streams.seen()
    detail = {
        "calm": calm,
        "flooded": flooded,
        "sent": sent,
        "kernel_drops": lost,
        "kinds": KINDS,
        "alarms": [f"{one.name} {one.node['name']}" for one in alarms],
    }
    return Outcome(
        _figures(calm, flooded, rate=rate, sent_per_s=sent / seconds, lost_per_s=lost / seconds, alarms=len(alarms)),
        detail,
    )


def _figures(
    calm: dict[str, Any], flooded: dict[str, Any], *, rate: float, sent_per_s: float, lost_per_s: float, alarms: int
) -> list[Figure]:
    note = f"sent {sent_per_s:,.0f} a second, of which the kernel dropped {lost_per_s:,.0f}"
    return [
        figure(
            "junk datagrams handled", sent_per_s - lost_per_s, "a second", at_least=rate * SENT_SHARE_MIN, note=note
        ),
        figure("suspicions and deaths, of anybody by anybody", alarms, "events", at_most=0),
        *_beside(calm, flooded, "CPU of the flooded node"),
    ]


def _member(through: str, seconds: float) -> Outcome:
    """Valid statements of a member that has joined, at all three others."""
    if through not in BY_MEMBER or seconds > MEMBER_SECONDS_MAX:
        raise BenchmarkError(
            f"--member takes {', '.join(BY_MEMBER)}, and --seconds {MEMBER_SECONDS_MAX:.0f} at most then"
        )
    order = msgspec.structs.replace(BY_MEMBER[through], seconds=seconds)
    assert order.rate * seconds <= MEMBER_MESSAGES_MAX
    with LocalMesh() as mesh:
        mesh.form(3)
        honest = list(mesh.agents)
        flooder = mesh.add(program="scripts.benchmarks.flooding_member")
        flooder.start(invite(honest[0]))
        mesh.wait_all_online()
        time.sleep(SETTLE_S)
        with Streams(honest, ["node_suspect", "node_offline"]) as streams:
            calm = _observed_all(honest, seconds)
            before = _links_between(honest)
            told = flooder.folder.with_suffix(".flooded")
            flooder.folder.with_suffix(".flood").write_bytes(msgspec.json.encode(order))
            flooded = _observed_all(honest, seconds)
            until(told.exists, seconds + AFTERMATH_S, "the flood to end")
            time.sleep(AFTERMATH_S)
            lost = len(before - _links_between(honest))
            alarms = streams.seen()
        sent = msgspec.json.decode(told.read_bytes(), type=Sent)
        online = [agent.ask("GET", "/api/status")["node_count"] for agent in honest]
        logged = {agent.name: agent.log_end() for agent in honest}
    detail = {
        "calm": calm,
        "flooded": flooded,
        "sent": msgspec.to_builtins(sent),
        "links_before": len(before),
        "alarms": [f"{one.name} {one.node['name']}" for one in alarms],
        "logged": logged,
    }
    note = f"{sent.messages / seconds:,.0f} messages a second, to {sent.victims} together"
    return Outcome(
        [
            figure("different statements to each", sent.statements / seconds, "a second", note=note),
            figure("suspicions and deaths, of anybody by an honest one", len(alarms), "events", at_most=0),
            figure("who sees fewer than all", sum(count < 4 for count in online), "nodes", at_most=0),
            figure("links between honest ones that were lost", lost, f"of {len(before)}", at_most=0),
            *_beside(calm, flooded, "CPU, mean of the three"),
        ],
        detail,
    )


def _observed_all(agents: list[LocalAgent], seconds: float) -> dict[str, Any]:
    """As `_observed` of the first; processor time of all."""
    before, began = [cost(agent.pid).cpu_s for agent in agents], time.monotonic()
    seen = _observed(agents[0], agents[1], seconds)
    passed = time.monotonic() - began
    each = [100 * (cost(one.pid).cpu_s - cpu) / passed for one, cpu in zip(agents, before, strict=True)]
    return seen | {"cpu_percent": sum(each) / len(each), "cpu_percent_each": [round(one, 1) for one in each]}


def _links_between(agents: list[LocalAgent]) -> set[tuple[int, int]]:
    """The TCP connections between these agents, by their two ports."""
    ends = [
        (one.laddr.port, one.raddr.port)
        for agent in agents
        for one in psutil.Process(agent.pid).net_connections("tcp")
        if one.status == psutil.CONN_ESTABLISHED
    ]
    return {end for end in ends if end[0] < end[1] and end[::-1] in ends}


def _beside(calm: dict[str, Any], flooded: dict[str, Any], whose_cpu: str) -> list[Figure]:
    """What is measured in calm and under a flood alike."""

    def beside(name: str, key: str, unit: str, at_most: float | None = None) -> Figure:
        return figure(
            name, flooded[key], unit, at_most=at_most, reference=calm[key], reference_name="without the flood"
        )

    return [
        beside("ping of the flooded node, p99", "ping_p99_ms", "ms", PING_MS_MAX),
        figure("pings that failed", flooded["pings_failed"], "pings", at_most=0),
        beside("age of its heartbeat at another node, worst", "age_s_max", "s"),
        beside("its GET /api/status, p99", "api_p99_ms", "ms"),
        beside(whose_cpu, "cpu_percent", "% of a core"),
    ]


def _observed(victim: LocalAgent, witness: LocalAgent, seconds: float) -> dict[str, Any]:
    """Pings from the witness, requests to the victim, the age of the victim's heartbeat, its processor time."""
    deadline = time.monotonic() + seconds
    pings: list[float] = []
    failed = 0
    answers: list[float] = []
    ages: list[float] = []

    def ask_victim() -> None:
        client = victim.client()
        while time.monotonic() < deadline:
            began = time.monotonic()
            client.get("/api/status")
            answers.append((time.monotonic() - began) * 1000)
            time.sleep(0.05)
        client.close()

    asking = threading.Thread(target=ask_victim)
    cpu, began = cost(victim.pid).cpu_s, time.monotonic()
    asking.start()
    client = witness.client()
    while time.monotonic() < deadline:
        report = client.ask("POST", f"/api/nodes/{victim.node_id}/ping", {"count": 20, "interval_s": 0.01})
        pings += report["rtts_ms"]
        failed += report["sent"] - report["received"]
        ages.append(node_in(client.get("/api/nodes"), victim.node_id).get("age_seconds", 0.0))
    client.close()
    asking.join()
    used = 100 * (cost(victim.pid).cpu_s - cpu) / (time.monotonic() - began)
    return {
        "pings": len(pings),
        "pings_failed": failed,
        "ping_p50_ms": round(quantile(pings, 0.5), 2),
        "ping_p99_ms": round(quantile(pings, 0.99), 2),
        "age_s_max": max(ages),
        "api_p50_ms": round(quantile(answers, 0.5), 2),
        "api_p99_ms": round(quantile(answers, 0.99), 2),
        "cpu_percent": round(used, 1),
    }


def _sender(port: int, rate: float, seconds: float, forged: list[bytes], cores: set[int]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "scripts.benchmarks.junk_sender", str(port), str(rate), str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if cores:
        os.sched_setaffinity(process.pid, cores)
    assert process.stdin is not None
    json.dump([one.hex() for one in forged], process.stdin)
    process.stdin.close()
    return process


def _sent(process: "subprocess.Popen[str]") -> int:
    with process:
        assert process.stdout is not None
        return int(process.stdout.read())


def key_id_of(folder: Path) -> bytes:
    """The id of the gossip key in use: anybody who sees one datagram of the mesh knows it."""
    connection = apsw.Connection(str(folder / DATABASE_FILE), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        rows = connection.execute("SELECT key FROM kernel_protocol_state WHERE machine = 'keys'").fetchall()
    finally:
        connection.close()
    for (key,) in rows:
        if isinstance(key, bytes) and len(key) == 4:
            return key
    raise BenchmarkError("no gossip key is stored where it was expected; has its table or form changed?")


def kernel_drops(port: int) -> int:
    """Datagrams that the kernel threw away because the socket's buffer was full. 0 where it does not tell."""
    table = Path("/proc/net/udp")
    if not table.is_file():
        return 0
    wanted = f":{port:04X}"
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    return sum(int(row[-1]) for row in rows if row[1].endswith(wanted))
