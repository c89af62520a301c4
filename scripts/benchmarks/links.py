"""Links between agents: the round trip that `meshnode ping` shows, and a bulk stream beside a bare copy over TLS."""

from functools import partial
from typing import Final

import trio

from scripts.bench_links import bench_links
from scripts.benchmarks.agents import LocalMesh
from scripts.benchmarks.figures import Outcome, figure, quantile

PING_MS_MAX: Final = 1.0
BULK_MB_S_MIN: Final = 400.0
BULK_OF_BARE_MIN: Final = 0.8


def ping(*, count: int = 1000, rounds: int = 3) -> Outcome:
    """Round trips of `POST /api/nodes/X/ping` between two agents; the median of the rounds."""
    with LocalMesh() as mesh:
        mesh.form(2)
        asked, other = mesh.agents
        path = f"/api/nodes/{other.node_id}/ping"
        asked.ask("POST", path, {"count": 100})
        reports = [asked.ask("POST", path, {"count": count}) for _ in range(rounds)]
    p50 = quantile([one["p50_ms"] for one in reports], 0.5)
    note = f"lost {sum(one['sent'] - one['received'] for one in reports)} of {count * rounds}"
    return Outcome(
        [
            figure("ping over a link, p50", p50, "ms", at_most=PING_MS_MAX, note=note),
            figure("ping over a link, p99", quantile([one["p99_ms"] for one in reports], 0.5), "ms"),
        ],
        {"rounds": [{name: one[name] for name in ("min_ms", "p50_ms", "p99_ms", "max_ms")} for one in reports]},
    )


def bulk(*, mebibytes: int = 2048, repeat: int = 3) -> Outcome:
    """Bytes a second of a bulk stream between two processes, beside a bare TLS copy between the same two."""
    run = partial(bench_links, bulk_mib=mebibytes, calls=2000, repeat=repeat)
    result = trio.run(run)
    return Outcome(
        [
            figure(
                "bulk stream between two agents",
                result["bulk_mb_s"],
                "MB/s",
                at_least=BULK_MB_S_MIN,
                or_of_reference=BULK_OF_BARE_MIN,
                reference=result["bare_trio_tls_mb_s"],
                reference_name="bare trio TLS",
                note=f"{result['bulk_over_bare']:.2f} of the bare copy; 0.8 of it would do too",
            ),
            figure("call over an open link, p50", result["call_p50_ms"], "ms", at_most=PING_MS_MAX),
            figure("calls a second, 50 at once", result["calls_per_s"], "calls/s"),
            figure("opening a link and a first call, p50", result["open_link_and_call_p50_ms"], "ms"),
        ],
        dict(result),
    )
