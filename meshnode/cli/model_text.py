"""What the local API says of models as text for people. Pure; everything of peers escaped. See `render`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from meshnode.cli.screen import coloured, table
from meshnode.cli.units import duration_text, size_text
from meshnode.kernel.redaction import printable

Answer = Mapping[str, Any]
_LABEL_COLUMNS: Final = 13


def models_text(models: Sequence[Answer], names: Mapping[str, str], width: int | None = None, *, me: str = "") -> str:
    """`meshnode models`: one line for each, those that are ready first. `names` of nodes by id; `me`: this node's."""
    headings = ("MODEL", "SIZE", "QUANT", "STATE", "SPEED", "WHERE")
    rows = [
        (
            printable(model["model"]),
            size_text(model["file_bytes"]) if model.get("file_bytes") else "",
            printable(model.get("quantization") or ""),
            coloured(state_of(model, me)),
            speed_text(model.get("tokens_per_s")),
            _where(model, names),
        )
        for model in sorted(models, key=lambda model: (not model["ollama_ready"], not model["is_downloaded"]))
    ]
    shown = table(headings, rows, right=("SIZE", "SPEED"), width=width, expendable=("SPEED", "QUANT", "WHERE", "SIZE"))
    return "\n".join([shown, *_troubles(models)])


def versions_text(effects: Sequence[Answer], names: Mapping[str, str]) -> str:
    """Below the list: what different versions of llama-cpp-python mean, and the command that mends it, and where."""
    lines = []
    for effect in effects:
        mend = ""
        if effect.get("outdated") and effect.get("update_to"):
            where = ", ".join(printable(names.get(node, node[:8])) for node in effect["outdated"])
            command = f"pipx runpip meshnode install llama-cpp-python=={printable(effect['update_to'])}"
            mend = f"\n  -> on {where}: {command}, and start the agent again"
        lines.append(f"{printable(effect['message'])}{mend}")
    return "\n".join(lines)


def state_of(model: Answer, me: str = "") -> str:
    """`ready`, where it fits, or by how much it does not. `me`: this node's id."""
    if model["ollama_ready"]:
        return "ready"
    if model.get("state") in ("loading", "failed"):
        return str(model["state"])
    if model.get("embeds"):
        return "makes vectors"
    if model["can_run"]:
        shards = model.get("shard_plan", {}).get("shards", ())
        if len(shards) > 1:
            return f"fits on {len(shards)} nodes"
        return "fits here" if me and model.get("single_node_id") == me else "fits on one node"
    missing = model["required_ram"] - model["cluster_ram"]
    if model["cluster_ram"] and missing > 0:
        return f"needs {size_text(missing)} more"
    return "cannot run" if model["is_downloaded"] else "not fetched"


def model_text(model: Answer, names: Mapping[str, str], *, me: str = "") -> str:
    """`meshnode models NAME`: everything known of one."""
    needs = f"{size_text(model['required_ram'])} of memory"
    free = f", {size_text(model['cluster_ram'])} free in the mesh" if model["cluster_ram"] else ""
    facts = [
        ("model", printable(model["model"])),
        ("aliases", ", ".join(map(printable, model.get("aliases", ())))),
        ("about", printable(model.get("description") or "")),
        ("state", coloured(state_of(model, me))),
        ("why", printable(model.get("reason") or "")),
        ("needs", needs + free if model["required_ram"] else ""),
        ("speed", speed_text(model.get("tokens_per_s"))),
        ("layers", shards_text(model["shard_plan"]["shards"]) if "shard_plan" in model else ""),
        ("held by", _where(model, names)),
        ("file", size_text(model["file_bytes"]) if model.get("file_bytes") else ""),
        ("kind", " ".join(printable(str(model[key])) for key in ("architecture", "quantization") if model.get(key))),
        ("context", f"{model['context_max']} tokens" if model.get("context_max") else ""),
        ("licence", printable(model.get("licence") or "")),
        ("source", printable(model.get("source") or "")),
        ("digest", printable(model.get("digest") or "")),
    ]
    return "\n".join(f"{label:<{_LABEL_COLUMNS}}{value}" for label, value in facts if value)


def plan_text(plan: Answer, width: int | None = None) -> str:
    """`meshnode plan`: where the layers would go and why; then the ways that were not chosen."""
    needs = f"{size_text(plan['bytes_needed'])} needed, {size_text(plan['bytes_free'])} free"
    head = f"{printable(plan['model'])}, context of {plan['context']} tokens: {needs}"
    ways = plan.get("plans", ())
    if not plan["fits"] or not ways:
        return f"{head}\nIt does not fit: {printable(plan['reason'])}"
    chosen = next((way for way in ways if way.get("chosen")), ways[0])
    speed = f"{speed_text(chosen['tokens_per_s'])}, first token after {duration_exact(chosen['first_token_s'])}"
    reasons = dict.fromkeys(filter(None, (plan["reason"], chosen["reason"])))
    rows = [
        (
            printable(stage["node_name"]),
            f"{stage['first']}-{stage['last'] - 1}",
            str(stage["last"] - stage["first"]),
            size_text(stage.get("bytes", 0)),
            str(stage.get("gpu_layers", 0)),
        )
        for stage in chosen["stages"]
    ]
    headings = ("NODE", "LAYERS", "COUNT", "MEMORY", "ON GPU")
    lines = [head, f"{chosen['engine']}: {speed}", *map(printable, reasons)]
    if chosen.get("computes_s"):
        lines.append(_one_token(chosen))
    if rows:
        shown = table(headings, rows, right=("COUNT", "MEMORY", "ON GPU"), width=width, expendable=("COUNT", "ON GPU"))
        lines += ["", shown]
    others = [way for way in ways if way is not chosen]
    if others:
        lines += ["", "Not chosen:", *(f"  {_other(way)}" for way in others)]
    return "\n".join(lines)


def _one_token(way: Answer) -> str:
    """`A token takes den 21.5 ms, attic 20.9 ms, the way 0.8 ms, as sessions of this model showed.`"""
    stages = zip(way["stages"], way["computes_s"], strict=True)
    parts = [f"{printable(stage['node_name'])} {duration_exact(seconds)}" for stage, seconds in stages]
    if len(parts) > 1:
        parts.append(f"the way {duration_exact(way.get('wire_s', 0.0))}")
    known = "as sessions of this model showed" if way.get("learnt") else "by a short trial; no session has shown it yet"
    return f"A token takes {', '.join(parts)}, {known}."


def answer_text(shards: Iterable[Answer], usage: Answer) -> str:
    """The line below an answer: how fast it was, and which nodes ran which layers."""
    first = usage.get("first_token_s")
    parts = [
        speed_text(usage.get("tokens_per_s")),
        f"first token after {duration_exact(first)}" if first is not None else "",
        shards_text(shards),
    ]
    return ", ".join(part for part in parts if part)


def shards_text(shards: Iterable[Answer]) -> str:
    """`den 0-10, attic 11-21`: layers of nodes."""
    return ", ".join(f"{printable(one['node_name'])} {one['layer_start']}-{one['layer_end']}" for one in shards)


def speed_text(tokens_per_s: float | None) -> str:
    """`31 tok/s`; empty when not known."""
    if tokens_per_s is None:
        return ""
    return f"{tokens_per_s:.{0 if tokens_per_s >= 9.95 else 1}f} tok/s"


def duration_exact(seconds: float) -> str:
    """`0.42 s`, `5.1 s`; longer ones in the largest units."""
    if seconds >= 60:
        return duration_text(seconds)
    return f"{seconds:.{2 if seconds < 1 else 1}f} s"


def _troubles(models: Sequence[Answer]) -> list[str]:
    """Why what should be loaded is not: below the list, whatever the terminal's width."""
    return [
        f"{printable(model['model'])}: {printable(model['reason'])}"
        for model in models
        if model.get("reason") and not model["ollama_ready"] and (model.get("pinned") or model.get("state") == "failed")
    ]


def _other(way: Answer) -> str:
    nodes = ", ".join(printable(stage["node_name"]) for stage in way["stages"])
    over = f" on {nodes}" if nodes else ""
    return f"{way['engine']}{over}: {speed_text(way['tokens_per_s'])}; {printable(way['reason'])}"


def _where(model: Answer, names: Mapping[str, str]) -> str:
    held = ", ".join(printable(names.get(node, node[:8])) for node in model.get("held_by", ()))
    return held or ("not fetched" if not model["ollama_ready"] else "")
