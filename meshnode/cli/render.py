"""The local API's answers as text for people. Pure: answers and the time in, text out, everything of peers escaped.

Answers come as decoded JSON, and absent fields are absent: an agent of another version may know more or less.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from meshnode.cli.screen import coloured, table
from meshnode.cli.units import ago_text, duration_text, milliseconds_text, size_text, used_text
from meshnode.kernel.redaction import printable

Answer = Mapping[str, Any]

ID_CHARS_SHOWN: Final = 8
_LABEL_COLUMNS: Final = 13


def status_text(summary: Answer, width: int | None = None) -> str:
    """`meshnode status`: the mesh, this node, the coordinator, sums, warnings; then one line for each peer."""
    online, offline = summary["node_count"], summary["offline_count"]
    lines = [
        _labelled("mesh", f"{summary['mesh_id']}, {online} of {online + offline} nodes online"),
        _labelled(
            "this node",
            f"{printable(summary['name'])}, {summary['role']}, up {duration_text(summary['uptime_seconds'])}, "
            f"meshnode {printable(summary['version'])}",
        ),
        _labelled("", summary["node_id"]),
        _labelled("coordinator", coordinator_text(summary.get("coordinator"), summary["node_id"])),
        _labelled("memory", f"{used_text(summary['used_ram'], summary['total_ram']) or 'unknown'} used"),
        _labelled("storage", f"{used_text(summary['used_storage'], summary['total_storage']) or 'unknown'} used"),
        _labelled("gpus", _gpus_text(summary)),
    ]
    lines += [_labelled("warning", printable(warning)) for warning in summary.get("warnings", ())]
    peers = summary.get("peers", ())
    if peers:
        lines += ["", _peers_table(peers, width)]
    else:
        lines += ["", "No other node yet. `meshnode invite` makes a one-time URL for the next machine."]
    return "\n".join(lines)


def coordinator_text(coordinator: Answer | None, me: str) -> str:
    """Whom this node follows, and whether it may act."""
    if coordinator is None:
        return "none known"
    who = printable(coordinator["name"]) + (" (this node)" if coordinator["id"] == me else "")
    if coordinator["quorate"]:
        return f"{who}, term {coordinator['term']}"
    reason = printable(coordinator.get("reason") or "most voters cannot be reached")
    return f"{who}, term {coordinator['term']}, without quorum: {reason}"


def nodes_text(nodes: Sequence[Answer], wall: float, width: int | None = None) -> str:
    """`meshnode nodes`: one line for each member, by name."""
    ordered = sorted(nodes, key=lambda node: (node["name"].casefold(), node["id"]))
    headings = (
        "NAME", "ID", "STATUS", "ROLE", "COORD", "CPU", "RAM", "GPU", "ADDRESS", "RTT", "VERSION", "LAST SEEN",
    )  # fmt: skip
    rows = (_node_row(node, wall) for node in ordered)
    expendable = ("VERSION", "ID", "GPU", "ADDRESS", "LAST SEEN", "RAM", "COORD", "RTT")
    body = table(headings, rows, right=("CPU", "RAM", "RTT"), width=width, expendable=expendable)
    online = sum(node["status"] == "online" for node in nodes)
    return f"{body}\n\n{online} of {len(nodes)} nodes online"


def state_of(node: Answer) -> str:
    """One word: online, suspect, incompatible, left or offline."""
    if node.get("incompatible"):
        return "incompatible"  # even if it left: it stopped as the old version and speaks as another now
    if node.get("left"):
        return "left"
    return "suspect" if node["status"] == "online" and node.get("suspect") else str(node["status"])


def node_text(node: Answer, wall: float) -> str:
    """`meshnode node NAME`: everything known of one member."""
    up = node["status"] == "online"
    facts = [
        ("name", printable(node["name"]) + (" (this node)" if node.get("this_node") else "")),
        ("id", node["id"]),
        ("status", coloured(state_of(node)) + (", coordinator" if node.get("coordinator") else "")),
        ("role", node.get("role", "")),
        ("address", _address_of(node)),
        ("addresses", ", ".join(printable(address) for address in node.get("addresses", ()))),
        ("round trip", milliseconds_text(node.get("rtt_ms")) if "rtt_ms" in node else ""),
        ("datagrams", "blocked; they travel over the link" if node.get("udp_blocked") else ""),
        ("last seen", "" if node.get("this_node") else _seen(node, wall)),
        ("joined", ago_text(node.get("joined_at"), wall) if node.get("joined_at") else ""),
        (
            "up",
            duration_text(node["uptime_seconds"]) if node.get("uptime_seconds") and up else "",
        ),
        ("version", printable(node.get("version") or "")),
        ("system", _system(node)),
        ("processor", _processor(node)),
        ("load", _load(node)),
        ("memory", _sums(node, "ram")),
        ("storage", _sums(node, "storage")),
        ("gpu", _gpu_text(node.get("gpu", {}), long=True)),
        ("battery", _battery(node)),
    ]
    return "\n".join(_labelled(label, value) for label, value in facts if value)


def invitations_text(lines: Sequence[Answer], wall: float, width: int | None = None) -> str:
    """`meshnode invite --list`."""
    if not lines:
        return "No invitation was made on this node."
    rows = [
        (
            line["token"],
            coloured(line["state"]),
            line["role"],
            duration_text(line["expires_in_s"]) if line["state"] == "open" else "-",
            ago_text(line["created_at"], wall),
            printable(line.get("redeemed_name") or line.get("redeemed_by") or ""),
            str(line["wrong_proofs"] or ""),
        )
        for line in lines
    ]
    headings = ("TOKEN", "STATE", "ROLE", "EXPIRES IN", "MADE", "USED BY", "WRONG")
    return table(headings, rows, width=width, expendable=("MADE", "ROLE", "WRONG"))


def ping_text(report: Answer) -> str:
    """`meshnode ping NAME`."""
    target = printable(report["name"])
    lost = report["sent"] - report["received"]
    over = f" over the {report.get('transport', 'link')}"
    if report.get("address"):
        over += f" to {printable(report['address'])}"
    lines = [f"{target}: {report['received']} of {report['sent']} answered{over}" + (f", {lost} lost" if lost else "")]
    if report["received"]:
        figures = (("min", "min_ms"), ("p50", "p50_ms"), ("p99", "p99_ms"), ("max", "max_ms"))
        lines.append("  ".join(f"{name} {milliseconds_text(report.get(key))}" for name, key in figures))
    return "\n".join(lines)


def metrics_text(figures: Answer) -> str:
    """`meshnode metrics`: one line for each figure and set of labels."""
    return "\n".join(f"{printable(name)} {value}" for name, value in sorted(_flat(figures)))


def _flat(figures: Answer) -> Iterable[tuple[str, str]]:
    for name, value in figures.items():
        if not isinstance(value, Mapping):
            yield name, f"{value:g}" if isinstance(value, float) else str(value)
        elif {"count", "sum"} >= set(value) and value:
            mean = value.get("sum", 0) / value["count"] if value.get("count") else 0
            yield name, f"count {value.get('count', 0)} mean {mean:.6g}"
        else:
            for label, inner in value.items():
                yield from _flat({f"{name}{{{label}}}": inner})


def _peers_table(peers: Sequence[Answer], width: int | None) -> str:
    rows = [
        (
            printable(peer["name"]),
            coloured(state_of(peer)),
            peer["role"],
            "yes" if peer.get("coordinator") else "",
            printable(peer.get("address") or ""),
            milliseconds_text(peer.get("rtt_ms")),
        )
        for peer in sorted(peers, key=lambda peer: (peer["name"].casefold(), peer["id"]))
    ]
    headings = ("PEER", "STATUS", "ROLE", "COORD", "ADDRESS", "RTT")
    return table(headings, rows, right=("RTT",), width=width, expendable=("ADDRESS", "ROLE", "COORD"))


def _node_row(node: Answer, wall: float) -> Sequence[str]:
    measured = _is_measured(node)
    return (
        printable(node["name"]) + (" (this)" if node.get("this_node") else ""),
        node["id"][:ID_CHARS_SHOWN],
        coloured(state_of(node)),
        node.get("role", ""),
        "yes" if node.get("coordinator") else "",
        f"{node['cpu_percent']:.0f}%" if measured else "",
        used_text(node.get("ram_used", 0), node.get("ram_total", 0)) if measured else "",
        _gpu_text(node.get("gpu", {})),
        _address_of(node) + (" (TCP only)" if node.get("udp_blocked") else ""),
        milliseconds_text(node.get("rtt_ms")),
        printable(node.get("version") or ""),
        _seen(node, wall),
    )


def _is_measured(node: Answer) -> bool:
    """Whether the load figures mean anything: not of a node that is gone, nor of one that has not told any yet."""
    return node["status"] == "online" and (bool(node.get("this_node")) or "age_seconds" in node)


def _seen(node: Answer, wall: float) -> str:
    return "now" if node.get("this_node") else ago_text(node.get("last_seen"), wall)


def _address_of(node: Answer) -> str:
    addresses = node.get("addresses", ())
    return printable(node.get("address") or (addresses[0] if addresses else ""))


def _gpu_text(gpu: Answer, *, long: bool = False) -> str:
    if not gpu.get("available"):
        return ""
    free = f", {size_text(gpu.get('vram_free', 0))} of {size_text(gpu['vram'])} free" if gpu.get("vram") else ""
    text = printable(gpu.get("name", "GPU")) + (free if long else "")
    if long and gpu.get("utilization") is not None:
        text += f", {gpu['utilization']:.0f}% busy"
    if long and gpu.get("temp_celsius") is not None:
        text += f", {gpu['temp_celsius']:.0f} °C"
    return text


def _gpus_text(summary: Answer) -> str:
    count = summary["gpu_node_count"]
    if not count:
        return "none"
    free, total = size_text(summary["free_vram"]), size_text(summary["total_vram"])
    return f"on {count} node{'s' if count > 1 else ''}, {free} of {total} free"


def _system(node: Answer) -> str:
    parts = [node.get("os", ""), node.get("arch", ""), node.get("kernel", "")]
    return " ".join(printable(part) for part in parts if part and part != "unknown")


def _processor(node: Answer) -> str:
    cores = f"{node['cores']} cores" if node.get("cores") else ""
    return ", ".join(part for part in (printable(node.get("cpu_model") or ""), cores) if part)


def _load(node: Answer) -> str:
    if not _is_measured(node):
        return ""
    old = f", {duration_text(node['age_seconds'])} ago" if node.get("age_seconds", 0) >= 5 else ""
    free = f", {node['slots_free']} task slots free" if "slots_free" in node else ""
    return f"{node['cpu_percent']:.0f}%{free}{old}"


def _sums(node: Answer, what: str) -> str:
    used, total = node.get(f"{what}_used", 0), node.get(f"{what}_total", 0)
    return used_text(used, total) if _is_measured(node) else size_text(total) if total else ""


def _battery(node: Answer) -> str:
    if "battery_percent" not in node:
        return ""
    return f"{node['battery_percent']}%" + (", not plugged in" if node.get("on_battery") else "")


def _labelled(label: str, value: str) -> str:
    return f"{label:<{_LABEL_COLUMNS}}{value}"
