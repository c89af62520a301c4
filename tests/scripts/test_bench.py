"""The benchmarks themselves: goals are judged, reports read, floods built, and real agents measured by small runs."""

import json
import os
import struct
from random import Random

import pytest

from protocol.ids import MeshId, NodeId, short_id
from protocol.wire import limits
from protocol.wire.datagram import mesh_tag
from scripts.benchmarks import __main__ as command
from scripts.benchmarks.agents import BenchmarkError, LocalMesh
from scripts.benchmarks.api_load import bare_server, read_wrk
from scripts.benchmarks.detection import detection
from scripts.benchmarks.events import parse
from scripts.benchmarks.figures import Outcome, figure, measured, quantile, text
from scripts.benchmarks.footprint import footprint
from scripts.benchmarks.http_load import Loader
from scripts.benchmarks.junk import KINDS, SAMPLES, datagrams, kernel_drops, key_id_of
from scripts.benchmarks.junk_sender import flood
from tests.house.source import ROOT

MESH = MeshId("2mq6rrodgdohf5su36rk2pmvw4")
NODE = NodeId("d6ipnxxef66sonpqh4evhtuw7jyskkce")


# ---- judging and reporting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured_value", "bounds", "met"),
    [
        (1.0, {"at_most": 1.0}, True),
        (1.1, {"at_most": 1.0}, False),
        (1.0, {"at_least": 1.0}, True),
        (0.9, {"at_least": 1.0}, False),
        (0.9, {"at_least": 1.0, "reference": 1.1, "or_of_reference": 0.8}, True),
        (0.9, {"at_least": 1.0, "reference": 1.2, "or_of_reference": 0.8}, False),
        (0.9, {}, None),
    ],
)
def test_a_figure_is_judged_by_its_goal(measured_value: float, bounds: dict[str, float], met: bool | None) -> None:
    assert figure("x", measured_value, "s", **bounds).met is met  # type: ignore[arg-type]  # only numbers are given


def test_quantiles_are_values_that_were_measured() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([1, 2], 0.99) == 2
    assert quantile([], 0.5) == 0.0


def test_a_report_says_what_was_missed_and_how_busy_the_machine_was() -> None:
    report = measured("start", lambda: Outcome([figure("late", 2.0, "s", at_most=1.0), figure("seen", 5, "nodes")]))
    head, columns, late, seen = text(report).splitlines()
    assert head.startswith(f"start: 0 s on {os.cpu_count()} cores")
    assert columns.split()[:4] == ["figure", "measured", "goal", "met"]
    assert late.split() == ["late", "2", "s", "≤", "1", "NO"]
    assert seen.split() == ["seen", "5", "nodes"]
    assert report.machine.cores == os.cpu_count()


# ---- the command --------------------------------------------------------------------------------------------------


def test_every_benchmark_can_be_named_with_its_options() -> None:
    for name, benchmark in command.BENCHMARKS.items():
        chosen = command.parser().parse_args([name, "--json"])
        assert chosen.json
        assert {option: getattr(chosen, option) for option in command.options_of(benchmark)} == command.options_of(
            benchmark
        )


def test_an_unknown_benchmark_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["nothing"])
    assert ended.value.code == 2
    assert "footprint" in capsys.readouterr().err


def test_the_database_benchmark_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--json", "database", "--seconds", "0.1", "--writers", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "database"
    assert report["figures"][0]["measured"] > 0
    assert report["figures"][0]["reference_name"] == "one writer"
    assert len(report["machine"]["load_before"]) == 3


def test_the_script_is_executable_and_documented() -> None:
    assert (ROOT / "scripts" / "bench").stat().st_mode & 0o111
    documented = (ROOT / "docs" / "performance.md").read_text()
    for name in command.BENCHMARKS:
        assert f"scripts/bench {name}" in documented, f"docs/performance.md does not say what {name} measures"


# ---- reading what others say --------------------------------------------------------------------------------------

WRK = """Running 2s test @ http://127.0.0.1:1/
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    15.66ms    2.02ms  40.52ms   92.42%
  Latency Distribution
     50%   15.25ms
     75%   15.79ms
     90%   16.83ms
     99%    1.20s
  3200 requests in 1.00s, 1.00MB read
{more}Requests/sec:   3199.12
Transfer/sec:      1.00MB
"""


def test_the_report_of_wrk_is_read() -> None:
    assert read_wrk(WRK.format(more="")) == {"requests_per_s": 3199.12, "p50_ms": 15.25, "p99_ms": 1200.0, "failed": 0}
    more = "  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 5\n"
    assert read_wrk(WRK.format(more=more))["failed"] == 15
    with pytest.raises(BenchmarkError):
        read_wrk("wrk: command not understood")


def test_events_are_stamped_with_the_piece_that_completed_them() -> None:
    head = b"HTTP/1.1 200\r\ncontent-type: text/event-stream\r\n\r\n"
    first = b'1f\r\nevent: node_updated\nid: e-1\ndata: {"last_seen":"x"}\n\n\r\n'
    pieces = [(1.0, head + first[:30]), (2.0, first[30:]), (3.0, b": keep-alive\n\n")]
    assert parse(pieces) == [(2.0, "e-1", {"last_seen": "x"})]


# ---- the flood ----------------------------------------------------------------------------------------------------


def test_junk_looks_like_what_it_says() -> None:
    made = datagrams(MESH, NODE, 7, b"keyi", Random(1))
    assert len(made) == SAMPLES
    assert all(len(one) <= limits.DATAGRAM_BYTES_MAX for one in made)
    by_kind = {kind: struct.unpack_from(">B4s4s8sI", made[number]) for number, kind in enumerate(KINDS)}
    mine = (1, mesh_tag(MESH), b"keyi", short_id(NODE), 7)
    assert by_kind["forged"] == mine
    differs = {"other version": 0, "other mesh": 1, "unknown key": 2, "stranger": 3, "old boot": 4}
    for kind, field in differs.items():
        assert [number for number in range(5) if by_kind[kind][number] != mine[number]] == [field]


# ---- real agents --------------------------------------------------------------------------------------------------


def test_the_own_load_client_counts_answers() -> None:
    with bare_server(b'{"a":1}', set()) as (port, _):
        answered = Loader(port, "/").run(4, 0.3)
    assert answered["requests_per_s"] > 50
    assert answered["failed"] == 0
    assert 0 < answered["p50_ms"] <= answered["p99_ms"]


@pytest.mark.serial
def test_an_agent_is_measured_and_flooded() -> None:
    with LocalMesh() as mesh:
        agent = mesh.add()
        agent.start()
        assert agent.ready_at > agent.started_at
        assert len(key_id_of(agent.folder)) == 4
        before = kernel_drops(agent.peer_port)
        made = datagrams(agent.mesh_id, agent.node_id, 1, key_id_of(agent.folder), Random(1))
        assert flood(agent.peer_port, 2000, 0.3, made) > 300
        assert kernel_drops(agent.peer_port) == before
        assert agent.ask("GET", "/api/status")["node_count"] == 1
        with pytest.raises(BenchmarkError, match="404"):
            agent.ask("GET", "/api/nothing")
    assert not agent.folder.exists()


@pytest.mark.serial
def test_the_footprint_of_a_small_mesh() -> None:
    outcome = footprint(nodes=2, seconds=0.5, settle_s=0.0)
    assert {one.figure for one in outcome.figures} >= {"RSS of an agent, largest", "CPU of an agent, largest"}
    assert 20 < outcome.figures[0].measured < 500
    assert len(outcome.detail["rss_mb"]) == 2


@pytest.mark.serial
def test_a_death_is_detected_and_a_restart_seen() -> None:
    outcome = detection(nodes=3, kills=1, settle_s=2.0)
    by_name = {one.figure: one for one in outcome.figures}
    assert 0.5 < by_name["kill -9 known to all 2 others, p50"].measured < 30
    assert by_name["others wrongly declared dead, in all views"].measured == 0
    assert len(outcome.detail["deaths"]) == 1
