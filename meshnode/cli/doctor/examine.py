"""All checks of the doctor at once, each in a thread of its own and none waited for longer than 2 seconds."""

from collections.abc import Mapping
from typing import Final

import trio

from meshnode.cli.doctor.finding import Check, Finding, Patient, Result
from meshnode.cli.doctor.machine import (
    check_agent,
    check_clock,
    check_command,
    check_data_folder,
    check_database,
    check_entropy,
    check_health,
    check_lingering,
    check_open_files,
    check_python,
    check_space,
)
from meshnode.cli.doctor.network import (
    check_addresses,
    check_firewall,
    check_local_names,
    check_multicast,
    check_ports,
)
from meshnode.cli.doctor.tools import check_engine, check_gpu, check_rpc, check_sandbox

CHECK_LIMIT_S: Final = 2.0

CHECKS: Final[Mapping[str, Check]] = {
    "python": check_python,
    "command": check_command,
    "agent": check_agent,
    "health": check_health,
    "data_folder": check_data_folder,
    "database": check_database,
    "space": check_space,
    "ports": check_ports,
    "addresses": check_addresses,
    "firewall": check_firewall,
    "multicast": check_multicast,
    "local_names": check_local_names,
    "clock": check_clock,
    "entropy": check_entropy,
    "open_files": check_open_files,
    "lingering": check_lingering,
    "engine": check_engine,
    "rpc": check_rpc,
    "gpu": check_gpu,
    "sandbox": check_sandbox,
}


async def examine(
    patient: Patient, checks: Mapping[str, Check] = CHECKS, *, limit_s: float = CHECK_LIMIT_S
) -> list[Finding]:
    """The findings in the order of `checks`, after at most about `limit_s`.

    A check that hangs is reported as a warning and its thread is left behind.
    """
    findings: dict[str, Finding] = {}
    threads = trio.CapacityLimiter(max(1, len(checks)))

    async def one(name: str, check: Check) -> None:
        findings[name] = Finding(name, Result.WARN, f"could not be looked at within {limit_s:g} s")
        with trio.move_on_after(limit_s):
            try:
                findings[name] = await trio.to_thread.run_sync(check, patient, abandon_on_cancel=True, limiter=threads)
            except OSError as error:
                findings[name] = Finding(name, Result.WARN, f"could not be looked at: {error}")

    async with trio.open_nursery() as nursery:
        for name, check in checks.items():
            nursery.start_soon(one, name, check)
    return [findings[name] for name in checks]
