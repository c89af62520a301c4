"""One real agent in a process of its own, as a test wants it: `python tests/support/agent_process.py OPTIONS`.

OPTIONS is one JSON object: `settings` (dotted key to value), `join_url`, `clock_ahead_s` (the wall clock is wrong by so
much), `versions` ([min, max] of the protocol that this agent claims to speak) and `llama` (the `version` of
llama-cpp-python that its engines claim to be, what they claim of `rpc`, whether they really compute otherwise, by
`flash_attention`, or give no hidden states, by `uncut`). One JSON line on standard output says that it is ready; a
MeshError goes to standard error as JSON, with exit code 1.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(options: dict[str, Any]) -> int:
    """Set the world as told, then run the agent until it is stopped. Imports come after, because they read it."""
    ahead_s = options.get("clock_ahead_s", 0.0)
    if ahead_s:
        true_time, true_time_ns = time.time, time.time_ns
        time.time = lambda: true_time() + ahead_s
        time.time_ns = lambda: true_time_ns() + int(ahead_s * 1e9)
    if options.get("versions"):
        from protocol.wire import limits

        vars(limits).update(zip(("PROTOCOL_VERSION_MIN", "PROTOCOL_VERSION"), options["versions"], strict=True))

    if options.get("llama"):
        pretend(**options["llama"])

    from meshnode.kernel.errors import MeshError
    from meshnode.node import ReadyInfo, run_agent
    from meshnode.settings import load_settings

    def ready(info: ReadyInfo) -> None:
        print(json.dumps({"node_id": info.node_id, "mesh_id": info.mesh_id, "api": info.api}), flush=True)

    empty = Path(options["settings"]["node.data_dir"]).with_suffix(".toml")
    empty.touch()
    try:
        resolved = load_settings(config=empty, environ={}, flags=options["settings"])
        run_agent(resolved, join_url=options.get("join_url"), on_ready=ready)
    except MeshError as error:
        print(json.dumps({"code": error.code.value, "message": error.message}), file=sys.stderr, flush=True)
        return 1
    return 0


def pretend(version: str = "", flash_attention: bool = False, uncut: bool = False, rpc: str = "") -> None:
    """Engines of another version. They run for real; with flash attention they sum in another order, and in F16.

    Those that are `uncut` end as one does whose llama.cpp gives no hidden states (tests/llm/engine/test_hooks.py).
    `rpc`: what they say of llama.cpp's RPC, whatever they have.
    """
    from msgspec.structs import replace

    from meshnode.llm.engine import process

    original = process.open_engine
    if flash_attention:
        process.open_engine = lambda spec, **more: original(replace(spec, flash_attention=True), **more)
    if uncut:
        from meshnode.kernel.errors import ErrorCode, MeshError

        def part_refused(spec: Any, **more: Any) -> Any:
            if spec.is_last:
                return original(spec, **more)
            raise MeshError(ErrorCode.UNAVAILABLE, "It can only run whole models.", detail={"reason": "uncut"})

        process.open_engine = part_refused
    from meshnode.llm.service import lending

    if version:
        lending.engine_version = lambda: version
    if rpc:
        lending.rpc_support = lambda: rpc


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
