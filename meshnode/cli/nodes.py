"""Which node a person means: by name, by id, or by the beginning of its id."""

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import click

from meshnode.cli.client import AgentClient
from meshnode.cli.session import Session
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import printable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_CANDIDATES_MAX: Final = 10
_COMPLETION_TIMEOUT_S: Final = 1.0


def find_node(client: AgentClient, name: str) -> Any:
    """The one node of the mesh that `name` means. Raises MeshError: UNKNOWN_NODE, or CONFLICT with the candidates."""
    return choose(client.pages("/api/nodes"), name)


def choose(nodes: Sequence[Any], name: str) -> Any:
    """An exact id wins, then an exact name, then a name in other case, then the beginning of an id."""
    wanted = name.strip()
    rules = (
        [node for node in nodes if node["id"] == wanted],
        [node for node in nodes if node["name"] == wanted],
        [node for node in nodes if node["name"].casefold() == wanted.casefold()],
        [node for node in nodes if wanted and node["id"].startswith(wanted.lower())],
    )
    found = next((matches for matches in rules if matches), [])
    if len(found) == 1:
        return found[0]
    shown = printable(wanted)
    if not found:
        hint = _nearest(wanted, [node["name"] for node in nodes])
        raise MeshError(
            ErrorCode.UNKNOWN_NODE, f"No node of this mesh is called '{shown}'{hint} `meshnode nodes` lists them all."
        )
    lines = [f"  {node['id']}  {printable(node['name'])}  {node['status']}" for node in found[:_CANDIDATES_MAX]]
    if len(found) > _CANDIDATES_MAX:
        lines.append(f"  and {len(found) - _CANDIDATES_MAX} more")
    raise MeshError(
        ErrorCode.CONFLICT,
        f"'{shown}' could be any of these {len(found)} nodes; give more of the id:\n" + "\n".join(lines),
        detail={"candidates": [node["id"] for node in found[:_CANDIDATES_MAX]]},
    )


def _nearest(wanted: str, names: Sequence[str]) -> str:
    """Only a hint: a node is never chosen by a part of its name, because evicting the wrong one cannot be undone."""
    folded = {name.casefold(): name for name in names}
    near = [name for key, name in folded.items() if wanted and key.startswith(wanted.casefold())]
    near += [folded[key] for key in difflib.get_close_matches(wanted.casefold(), folded, n=1)]
    return f"; did you mean '{printable(near[0])}'?" if near else "."


def node_path(node: Any, verb: str = "") -> str:
    """The API's path of a node."""
    return f"/api/nodes/{quote(node['id'], safe='')}{verb}"


def complete_node(ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """For the shell: names that begin so, or nothing when no agent answers at once."""
    from click.shell_completion import CompletionItem

    told = ctx.params
    session = Session(api_port=told.get("api_port"), data_dir=told.get("data_dir"), config=told.get("config"))
    try:
        with session.agent() as client:
            nodes = client.pages("/api/nodes", timeout_s=_COMPLETION_TIMEOUT_S)
    except MeshError:
        return []
    return [
        CompletionItem(node["name"], help=f"{node['status']}, {node['id'][:8]}")
        for node in nodes
        if node["name"].startswith(incomplete) and printable(node["name"]) == node["name"]
    ]
