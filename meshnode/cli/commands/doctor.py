"""`meshnode doctor`: prints what the checks of `cli.doctor` found, and the commands that mend it."""

import os
from typing import TYPE_CHECKING, Final

import click

from meshnode.cli.screen import Progress, coloured, say, say_json
from meshnode.cli.session import DEFAULT_API_PORT, Session, example, running_ports, with_session
from meshnode.kernel.errors import EXIT_DONE, EXIT_FAILED, MeshError
from meshnode.kernel.redaction import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnode.cli.doctor import Finding, Told, Versions

HEALTH_TIMEOUT_S: Final = 2.0


@click.command(epilog=example("meshnode doctor", "meshnode doctor --json"))
@with_session
def doctor(session: Session) -> int:
    """Find what is missing here, and how to mend it.

    Looks at this machine and prints the command for everything that is not as it should be. Changes nothing.
    """
    import trio  # The checks run side by side; no other command needs it.

    from meshnode.cli.doctor import Patient, Result, examine
    from meshnode.cli.doctor.system import this_system

    settings = session.resolved.settings
    try:
        data_dir, (told, warnings, versions) = session.data_dir, _told(session)
    except MeshError:
        # That no agent answers, or something else on its port, is for the checks to say.
        data_dir, told, warnings, versions = session.usual_data_dir, {}, (), ()
    running = running_ports(data_dir)
    api_port = session.api_port or running.get("api_port") or settings.api.port or DEFAULT_API_PORT
    patient = Patient(
        data_dir=data_dir,
        system=this_system(),
        environment=dict(os.environ),
        peer_host=settings.peers.host,
        api_port=api_port,
        peer_port=running.get("peer_port", settings.peers.port),
        onboarding_port=running.get("onboarding_port", settings.onboarding.port),
        discovery_port=settings.discovery.port,
        multicast_group=settings.discovery.group,
        told=told,
        warnings=warnings,
        tasks=settings.tasks,
        trusts_user=not settings.api.require_token,
        versions=versions,
    )
    with Progress("examining this machine", quiet=session.as_json):
        findings = trio.run(examine, patient)
    failed = any(finding.result is Result.FAIL for finding in findings)
    if session.as_json:
        shown = [
            {
                "name": one.name,
                "result": one.result.value,
                "found": one.found,
                **({"mend": one.mend} if one.mend else {}),
            }
            for one in findings
        ]
        say_json({"ok": not failed, "findings": shown})
    else:
        say(findings_text(findings))
    return EXIT_FAILED if failed else EXIT_DONE


def _told(session: Session) -> "tuple[dict[str, Told], tuple[str, ...], tuple[Versions, ...]]":
    """What the agent, if one runs, knows of its own health, its warnings, and of versions of llama-cpp-python."""
    from meshnode.cli.doctor import Told, Versions

    with session.agent() as agent:
        report = agent.get_any_status("/api/health", timeout_s=HEALTH_TIMEOUT_S)
        status = agent.get_any_status("/api/status", timeout_s=HEALTH_TIMEOUT_S)
        models = agent.get_any_status("/api/llm/status?scope=local", timeout_s=HEALTH_TIMEOUT_S)
    checks = report.get("checks", {}) if isinstance(report, dict) else {}
    told = {name: Told(str(check["status"]), str(check["message"])) for name, check in checks.items()}
    me = status.get("node_id") if isinstance(status, dict) else None
    versions = tuple(
        Versions(str(one["message"]), one["effect"] == "shared", str(one["update_to"]) if me in one["outdated"] else "")
        for one in (models.get("versions", ()) if isinstance(models, dict) else ())
    )
    return told, tuple(map(str, status.get("warnings", ()) if isinstance(status, dict) else ())), versions


def findings_text(findings: "Sequence[Finding]") -> str:
    """One line for each finding, its mending below it, and the sum."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        mark = coloured(finding.result.value) + " " * (4 - len(finding.result.value))
        lines.append(f"{mark}  {finding.name:<{width}}  {printable(finding.found)}")
        if finding.mend:
            lines.append(f"{'':{6 + width}}  -> {printable(finding.mend)}")
    counts = {word: sum(finding.result.value == word for finding in findings) for word in ("warn", "fail")}
    if not any(counts.values()):
        return "\n".join([*lines, "", "Everything is as it should be."])
    fails = f"{counts['fail']} to mend before the agent can work, " if counts["fail"] else ""
    return "\n".join([*lines, "", f"{fails}{counts['warn']} worth a look."])
