"""`models`, `plan` and `rm-model`: which models there are, where they would go, and getting rid of them."""

from typing import Any, Final
from urllib.parse import urlencode

import click

from meshnode.cli.client import AgentClient
from meshnode.cli.model_text import model_text, models_text, plan_text, versions_text
from meshnode.cli.models import choose, complete_model, list_models, model_path, version_effects
from meshnode.cli.nodes import complete_node, find_node
from meshnode.cli.screen import Progress, confirm, note, say, say_json, terminal_columns
from meshnode.cli.session import Session, example, with_session
from meshnode.cli.units import size_text
from meshnode.kernel.errors import EXIT_DONE, EXIT_FAILED
from meshnode.kernel.redaction import printable

PLAN_TIMEOUT_S: Final = 60.0
REMOVE_TIMEOUT_S: Final = 90.0


@click.command(epilog=example("meshnode models", "meshnode models --all", "meshnode models llama-3.2-1b"))
@click.argument("name", required=False, shell_complete=complete_model)
@click.option("--all", "all_known", is_flag=True, help="Those too that nobody has fetched yet.")
@with_session
def models(session: Session, name: str | None, all_known: bool) -> None:
    """List models: size, where they are, whether they are ready, fit, or by how much they do not.

    With NAME: everything known of that one.
    """
    with session.agent() as agent:
        with Progress("planning", quiet=session.as_json):
            found = list_models(agent)
            if all_known or name is not None:
                listed = {model["model"] for model in found}
                found += [model for model in agent.pages("/api/llm/catalogue") if model["model"] not in listed]
        nodes = [] if session.as_json else agent.pages("/api/nodes")
        effects = [] if session.as_json or name is not None else version_effects(agent)
    names = {node["id"]: node["name"] for node in nodes}
    me = next((node["id"] for node in nodes if node.get("this_node")), "")
    if name is not None:
        one = choose(found, name)
        if session.as_json:
            say_json(one)
        else:
            say(model_text(one, names, me=me))
        return
    shown = [
        model for model in found if all_known or model["is_downloaded"] or model["ollama_ready"] or model.get("pinned")
    ]
    if session.as_json:
        say_json(shown)
    elif shown:
        say(models_text(shown, names, terminal_columns(), me=me))
        if effects:
            say(versions_text(effects, names))
    else:
        say("No model yet. `meshnode models --all` lists what can be had, `meshnode pull` fetches it.")


@click.command(epilog=example("meshnode plan llama-3.2-1b", "meshnode plan llama-3.2-1b --context 8192 --json"))
@click.argument("model", shell_complete=complete_model)
@click.option("--context", type=click.IntRange(1), help="Tokens of prompt and answer together.")
@with_session
def plan(session: Session, model: str, context: int | None) -> int:
    """Show where a model's layers would go, how fast it would be, and why.

    Nothing is loaded. The exit code is 1 if it does not fit.
    """
    query = {"model": model} | ({} if context is None else {"context": str(context)})
    with session.agent() as agent, Progress("planning", quiet=session.as_json):
        found = agent.get(f"/api/llm/plan?{urlencode(query)}", timeout_s=PLAN_TIMEOUT_S)
    if session.as_json:
        say_json(found)
    else:
        say(plan_text(found, terminal_columns()))
    return EXIT_DONE if found["fits"] else EXIT_FAILED


@click.command("rm-model", epilog=example("meshnode rm-model llama-3.2-1b", "meshnode rm-model demo --everywhere -y"))
@click.argument("name", shell_complete=complete_model)
@click.option("--node", shell_complete=complete_node, help="From that node's disk instead of this one's.")
@click.option("--everywhere", is_flag=True, help="From every node's disk.")
@click.option("--force", is_flag=True, help="Even while it is loaded.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@with_session
def rm_model(session: Session, name: str, node: str | None, everywhere: bool, force: bool, yes: bool) -> int:
    """Delete a model from disk.

    The exit code is 1 if some of it stays somewhere.
    """
    if everywhere and node is not None:
        raise click.UsageError("--node and --everywhere are two different things: give one of them")
    with session.agent() as agent:
        found = None if node is None else find_node(agent, node)
        place = "every node" if everywhere else "this node" if found is None else printable(found["name"])
        confirm(f"Delete {printable(name)} from the disk of {place}?", assume_yes=yes or session.as_json)
        query = {} if found is None else {"node": found["id"]}
        query |= {flag: "true" for flag, given in (("everywhere", everywhere), ("force", force)) if given}
        with Progress(f"deleting {name}", quiet=session.as_json):
            done = agent.delete(model_path(name, query), timeout_s=REMOVE_TIMEOUT_S)
        if session.as_json:
            say_json(done)
        else:
            _say_removed(agent, done)
    return EXIT_FAILED if done["unreachable"] or done.get("kept") else EXIT_DONE


def _say_removed(agent: AgentClient, done: Any) -> None:
    names = {node["id"]: node["name"] for node in agent.pages("/api/nodes")}

    def named(nodes: list[str]) -> str:
        return ", ".join(printable(names.get(node, node)) for node in nodes)

    if done["nodes"]:
        say(f"Deleted {printable(done['model'])} on {named(done['nodes'])}: {size_text(done['freed_bytes'])} freed.")
    else:
        say(f"Nothing of {printable(done['model'])} was there.")
    for why in done.get("kept", ()):
        note(f"Not deleted: {printable(why)}")
    if done["unreachable"]:
        note(f"Not reached, and not deleted there: {named(done['unreachable'])}. Say it again once they are back.")
