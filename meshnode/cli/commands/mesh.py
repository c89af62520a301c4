"""`status`, `nodes`, `node`, `rename`, `promote`, `evict` and `leave`: seeing the mesh, and changing who is in it."""

import time
from typing import Any

import click

from meshnode.cli.arrival import await_mesh
from meshnode.cli.nodes import complete_node, find_node, node_path
from meshnode.cli.render import node_text, nodes_text, status_text
from meshnode.cli.screen import Progress, confirm, note, say, say_json, terminal_columns
from meshnode.cli.session import Session, example, with_session
from meshnode.kernel.redaction import printable

NODE_ID_CHARS = 32
# Evicting, promoting and leaving wait for an admin's signature, or for voters.
CHANGE_TIMEOUT_S = 90.0


@click.command(epilog=example("meshnode status", "meshnode status --json"))
@with_session
def status(session: Session) -> None:
    """Show the mesh: this node, coordinator, sums, each peer."""
    with session.agent() as agent:
        summary = agent.get("/api/status")
    if session.as_json:
        say_json(summary)
    else:
        say(status_text(summary, terminal_columns()))


@click.command(epilog=example("meshnode nodes", "meshnode nodes --json"))
@with_session
def nodes(session: Session) -> None:
    """List every node: what it is, how busy, how far away."""
    with session.agent() as agent:
        found = agent.pages("/api/nodes")
        warnings = agent.get("/api/status").get("warnings", ())
    if session.as_json:
        say_json(found)
    else:
        say(nodes_text(found, time.time(), terminal_columns()))
    for warning in warnings:
        # An evicted node sees everybody offline: the table alone would send people looking for a broken network.
        note(f"warning: {printable(warning)}")


@click.command(epilog=example("meshnode node attic", "meshnode node 3kq7 --json", "meshnode node"))
@click.argument("name", shell_complete=complete_node, required=False)
@with_session
def node(session: Session, name: str | None) -> None:
    """Show one node in full.

    NAME is its name, its id or the beginning of its id. Without NAME: this one.
    """
    with session.agent() as agent:
        found = find_node(agent, agent.get("/api/status")["node_id"] if name is None else name)
    if session.as_json:
        say_json(found)
    else:
        say(node_text(found, time.time()))


@click.command(epilog=example("meshnode rename attic", "meshnode rename 'Big machine'"))
@click.argument("name")
@with_session
def rename(session: Session, name: str) -> None:
    """Give this node another name.

    All nodes show it from then on. Names are labels: two nodes may have the same.
    """
    with session.agent() as agent:
        own = find_node(agent, agent.get("/api/status")["node_id"])
        found = agent.patch(node_path(own), {"name": name})
    if session.as_json:
        say_json(found)
    else:
        say(f"This node was {printable(own['name'])} and is {printable(found['name'])} now.")


@click.command(epilog=example("meshnode promote attic"))
@click.argument("name", shell_complete=complete_node)
@with_session
def promote(session: Session, name: str) -> None:
    """Make a node an admin.

    An admin may invite, promote and evict, and can coordinate. NAME is a name, an id or the beginning of an id.
    """
    with session.agent() as agent, Progress("promoting", quiet=session.as_json):
        found = agent.post(node_path(find_node(agent, name), "/promote"), {}, timeout_s=CHANGE_TIMEOUT_S)
    if session.as_json:
        say_json(found)
    else:
        say(f"{printable(found['name'])} is an admin now.")


@click.command(epilog=example("meshnode evict attic", "meshnode evict attic --lost --yes"))
@click.argument("name", shell_complete=complete_node)
@click.option("--lost", is_flag=True, help="The machine is gone for good: do not wait for its vote.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@with_session
def evict(session: Session, name: str, lost: bool, yes: bool) -> None:
    """Put a node out of the mesh, for good.

    Its key is shut out: it comes back only with a new identity (`meshnode leave --force` there) and a new invitation.
    NAME is a name, an id or the beginning of an id.
    """
    with session.agent() as agent:
        # A machine that was evicted before is no member any more; that its vote is lost can still be said of its id.
        lost_id = lost and len(name) == NODE_ID_CHARS and name.isalnum()
        found = {"id": name, "name": name[:8]} if lost_id else find_node(agent, name)
        shown = f"{printable(found['name'])} ({found['id']})"
        confirm(f"Evict {shown} for good?", assume_yes=yes or session.as_json)
        with Progress(f"evicting {found['name']}", quiet=session.as_json):
            agent.delete(node_path(found) + ("?lost=true" if lost else ""), timeout_s=CHANGE_TIMEOUT_S)
    if session.as_json:
        say_json({"id": found["id"], "name": found["name"], "evicted": True})
    else:
        say(f"Evicted {shown}.")


@click.command(epilog=example("meshnode leave", "meshnode leave --force --yes"))
@click.option("--force", is_flag=True, help="Leave even if nobody can be told, or if no admin remains.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@with_session
def leave(session: Session, force: bool, yes: bool) -> None:
    """Leave the mesh with this machine. The agent then founds a mesh of its own; nothing on disk is deleted."""
    with session.agent() as agent:
        summary = agent.get("/api/status")
        others = summary["node_count"] + summary["offline_count"] - 1
        question = f"Leave the mesh {summary['mesh_id']} of {others} other node{'' if others == 1 else 's'}?"
        confirm(question, assume_yes=yes or session.as_json)
        with Progress("leaving", quiet=session.as_json):
            done: Any = agent.post("/api/cluster/leave", {"force": force}, timeout_s=CHANGE_TIMEOUT_S)
        with Progress("founding a mesh of its own", quiet=session.as_json):
            former = summary["mesh_id"]
            now = await_mesh(agent, former.__ne__, done=f"This machine left the mesh {former}", with_others=False)
    if session.as_json:
        say_json({**done, "mesh_id": now["mesh_id"], "node_id": now["node_id"]})
    else:
        say(f"left the mesh {former}; {printable(now['name'])} is alone in the new mesh {now['mesh_id']} now")
        say(f"what it had is kept in {printable(done['former'])}")
