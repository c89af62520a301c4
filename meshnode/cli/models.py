"""Which model a person means, and what the command line asks of it."""

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode

import click

from meshnode.cli.client import AgentClient
from meshnode.cli.session import Session
from meshnode.cli.units import size_text
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.near import nearest
from meshnode.kernel.redaction import printable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

AUTO: Final = "auto"
"""The best model that is ready, or the one that the settings name."""
_MODELS: Final = "/api/llm/models"
_CATALOGUE: Final = "/api/llm/catalogue"
_STATUS: Final = "/api/llm/status?scope=local"
_PLAN_TIMEOUT_S: Final = 60.0
_COMPLETION_TIMEOUT_S: Final = 1.0


def list_models(client: AgentClient, *, planned: bool = True) -> list[Any]:
    """Every model the mesh knows; unless `planned`, without the question whether it fits."""
    return client.pages(_MODELS if planned else f"{_MODELS}?plan=false")


def version_effects(client: AgentClient) -> list[Any]:
    """What versions of llama-cpp-python mean for the mesh's models; agents of earlier versions do not say."""
    status = client.get_any_status(_STATUS)
    return list(status.get("versions", ())) if isinstance(status, dict) else []


def model_path(name: str, query: dict[str, str]) -> str:
    """The API's path of a model; names have slashes and colons."""
    return f"{_MODELS}/{quote(name, safe='')}" + (f"?{urlencode(query)}" if query else "")


def choose(models: list[Any], name: str) -> Any:
    """The model of this name or alias. Raises MeshError NOT_FOUND with the nearest names."""
    for model in models:
        if name == model["model"] or name in model.get("aliases", ()):
            return model
    known = [model["model"] for model in models]
    near = [one for one in known if name.casefold() in one.casefold()] or nearest(name, known)
    hint = f"; did you mean {' or '.join(repr(printable(one)) for one in near[:3])}?" if near else "."
    raise MeshError(
        ErrorCode.NOT_FOUND,
        f"This mesh knows no model {printable(name)!r}{hint} `meshnode models --all` lists them, `meshnode pull` "
        "fetches more.",
    )


def check_model(client: AgentClient, name: str) -> None:
    """Raise MeshError NOT_FOUND, before anybody types a question, when there is no such model, or none at all."""
    models = list_models(client, planned=False)
    if name != AUTO:
        try:
            choose(models, name)
        except MeshError as error:
            raise not_pulled(client, name) or error from error
    elif not models:
        raise MeshError(
            ErrorCode.NOT_FOUND,
            "This mesh has no model yet. `meshnode models --all` lists what can be had, `meshnode pull` fetches it.",
        )


def not_pulled(client: AgentClient, name: str) -> MeshError | None:
    """What to do for a model that can be pulled by this name and is not here: how large it is, and whether it fits.

    None when there is no such model, or when that cannot be asked: then what failed first says more.
    """
    try:
        offered = client.pages(f"{_CATALOGUE}?plan=false")
        found = next((model for model in offered if name in (model["model"], *model.get("aliases", ()))), None)
        if found is None:
            return None
        plan = client.get(f"/api/llm/plan?{urlencode({'model': found['model']})}", timeout_s=_PLAN_TIMEOUT_S)
    except MeshError:
        return None
    if plan["fits"]:
        stages = len(next((way["stages"] for way in plan["plans"] if way.get("chosen")), ()))
        where = f"over {stages} nodes" if stages > 1 else "on one node"
        words = f"would run {where}. Fetch it first:\n  meshnode pull {printable(found['model'])}"
    else:
        words = f"would not fit. {printable(plan['reason'])} `meshnode models --all` lists what does."
    size = size_text(found["file_bytes"])
    return MeshError(ErrorCode.NOT_FOUND, f"{printable(name)} is not in this mesh yet. It has {size}, and {words}")


def complete_model(ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """For the shell: names that begin so, or nothing when no agent answers at once."""
    from click.shell_completion import CompletionItem

    told = ctx.params
    session = Session(api_port=told.get("api_port"), data_dir=told.get("data_dir"), config=told.get("config"))
    try:
        with session.agent() as client:
            models = client.pages(f"{_MODELS}?plan=false", timeout_s=_COMPLETION_TIMEOUT_S)
    except MeshError:
        return []
    names = {name for model in models for name in (model["model"], *model.get("aliases", ()))}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete) and printable(name) == name]
