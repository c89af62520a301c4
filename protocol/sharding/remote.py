"""Plans for llama.cpp's RPC: one node computes the whole model, others lend it memory and cores for its last layers.

It is for what the pipeline cannot take: a model that no node holds alone and that cannot be cut. llama.cpp keeps a
blocking connection to every server, so as few as possible are taken. Graphics devices are not lent this way.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from protocol.sharding.fitting import Fitting, Wish
from protocol.sharding.offers import Links, NodeOffer
from protocol.sharding.pipelines import FEW_NODES, NO_ENGINE
from protocol.sharding.plans import GB, Cut, Plan, Refusal, names_of, planned_stage
from protocol.sharding.predict import StageCost
from protocol.sharding.shapes import ModelShape

SERVERS_MAX: Final = 16
"""llama.cpp's own limit (GGML_RPC_MAX_SERVERS)."""

CLIENTS_MAX: Final = 16
"""How many nodes are tried as the one that computes."""

ROUND_TRIPS: Final = 2
"""Which a token waits for at each server: the layers' input goes there, their output comes back."""

BUILD_WORDS: Final = (
    'CMAKE_ARGS="-DGGML_RPC=on" pip install --force-reinstall --no-cache-dir --no-deps --no-binary llama-cpp-python'
    " llama-cpp-python=={version}"
)
_WHY: Final = {
    "not_built": "its llama-cpp-python was built without RPC",
    "not_isolated": "its system gives an engine no network of its own",
    "": "it does not say that it can",
}


class Lent(NamedTuple):
    """A plan: the client's layers first, then the servers'."""

    cuts: tuple[Cut, ...]
    fitting: Fitting
    computes_s: tuple[float, ...]
    round_s: float
    prompt_row_s: float
    fetch_bytes: int  # what the client still has to fetch of the file, which it needs whole


def plan_remote(shape: ModelShape, wish: Wish, offers: Sequence[NodeOffer], links: Links) -> Lent | None:
    """The plan with the fewest servers, then the fastest, over nodes that can; None if they do not suffice.

    `wish.stages_min` asks for so many nodes in equal parts; below two it is two.
    """
    whole = msgspec.structs.replace(shape, cuts=tuple(range(1, shape.layers)))
    fitting = Fitting(whole, wish)
    able = [msgspec.structs.replace(offer, devices=()) for offer in offers if offer.has_engine and offer.rpc == "yes"]
    able.sort(key=lambda offer: (-fitting.room(offer), offer.node))
    # Who holds most of the file comes first, then who has most room.
    clients = sorted(able, key=lambda offer: -offer.held(0, shape.layers))[:CLIENTS_MAX]
    found: list[Lent] = []
    for client in clients:
        others = [offer for offer in able if offer.node != client.node and offer.version == client.version]
        cuts = _shared(fitting, client, others)
        if cuts is not None:
            found.append(_costed(fitting, cuts, links))
    if not found:
        return None
    return min(found, key=lambda lent: (len(lent.cuts), lent.fetch_bytes, lent.round_s, lent.cuts[0][0].node))


def _shared(fitting: Fitting, client: NodeOffer, others: Sequence[NodeOffer]) -> tuple[Cut, ...] | None:
    """Equal parts over as many as were asked for, or the client filled first and then server after server."""
    layers, wanted = fitting.shape.layers, max(2, fitting.wish.stages_min)
    nodes = (client, *others[:SERVERS_MAX])
    if wanted > min(len(nodes), layers):
        return None
    equal = tuple(
        (offer, layers * at // wanted, layers * (at + 1) // wanted) for at, offer in enumerate(nodes[:wanted])
    )
    if all(fitting.place(*cut) is not None for cut in equal):
        return equal
    if fitting.wish.stages_min > 1:
        return None
    cuts: list[Cut] = []
    at = 0
    for offer in nodes:
        # The head comes with the last layer, so it may fit only without it; and nobody is left without a layer.
        end = fitting.reach(offer, at)
        if end == at:
            return None
        cuts.append((offer, at, end))
        at = end
        if at == layers:
            return tuple(cuts) if len(cuts) > 1 else None
    return None


def _costed(fitting: Fitting, cuts: tuple[Cut, ...], links: Links) -> Lent:
    client = cuts[0][0]
    computes, waits, row_s = [], 0.0, 0.0
    shape = fitting.shape
    for offer, first, end in cuts:
        placement = fitting.place(offer, first, end)
        assert placement is not None  # every cut was placed
        cost = StageCost(offer.node, placement.parts)
        computes.append(cost.compute_s(1))
        row_s += sum(speed.row_s * weight_bytes / speed.layer_bytes for speed, weight_bytes in cost.parts)
        if offer.node != client.node:
            link = links.between(client.node, offer.node)
            back = shape.n_vocab if end == shape.layers else shape.n_embd
            waits += ROUND_TRIPS * link.rtt_s + 4 * (shape.n_embd + back) / link.bytes_per_s
    missing = shape.layers - client.held(0, shape.layers)
    fetch = sum(sorted(shape.layer_bytes)[-missing:]) if missing else 0
    return Lent(cuts, fitting, tuple(computes), sum(computes) + waits, row_s, fetch)


def why_not(shape: ModelShape, wish: Wish, offers: Sequence[NodeOffer], links: Links) -> str:
    """What keeps llama.cpp's RPC from running it, in words; empty if it would not help."""
    hopeful = [msgspec.structs.replace(offer, rpc="yes") for offer in offers]
    lent = plan_remote(shape, wish, hopeful, links)
    if lent is None:
        return ""
    real = {offer.node: offer for offer in offers}
    lacking = [real[offer.node] for offer, _, _ in lent.cuts if real[offer.node].rpc != "yes"]
    names = ", ".join(offer.name for offer, _, _ in lent.cuts)
    reasons = "; ".join(f"{offer.name}: {_WHY[offer.rpc]}" for offer in lacking[:SERVERS_MAX])
    words = f"with llama.cpp's RPC it would run over {names} ({reasons})"
    if any(offer.rpc == "not_built" for offer in lacking):
        words += f"; there, install {BUILD_WORDS.format(version=lacking[0].version)}"
    return words


def asked_remote(shape: ModelShape, wish: Wish, offers: Sequence[NodeOffer], links: Links) -> Plan | Refusal:
    """The plan with llama.cpp's RPC, because somebody insists on it."""
    lent = plan_remote(shape, wish, offers, links)
    if lent is not None:
        return _remote_plan(lent, "asked for")
    able = sum(offer.has_engine for offer in offers)
    if able < 2:
        return Refusal(code=FEW_NODES, words=f"llama.cpp's RPC needs two nodes that can run models; there is {able}.")
    words = why_not(shape, wish, offers, links)
    if words:
        return Refusal(code=NO_ENGINE, words=f"llama.cpp's RPC cannot be used for {shape.name} now: {words}")
    needed = Fitting(shape, wish).needed_bytes(1)
    words = f"llama.cpp's RPC needs two nodes that hold {shape.name} together, {needed / GB:.1f} GB; there are none."
    return Refusal(code="no_memory", words=words, needed_bytes=needed)


def remote_or_refusal(fitting: Fitting, offers: Sequence[NodeOffer], links: Links, refusal: Refusal) -> Plan | Refusal:
    """What llama.cpp's RPC can do where neither a node nor a pipeline can."""
    lent = plan_remote(fitting.shape, fitting.wish, offers, links)
    if lent is not None:
        reason = f"cannot be cut ({fitting.shape.uncut_reason})" if not fitting.shape.cuts else "its pieces do not fit"
        return _remote_plan(lent, f"no node holds it alone, and for the pipeline it {reason}")
    words = why_not(fitting.shape, fitting.wish, offers, links)
    return msgspec.structs.replace(refusal, words=f"{refusal.words}; {words}") if words else refusal


def _remote_plan(lent: Lent, why: str) -> Plan:
    wish, rate = lent.fitting.wish, 1 / lent.round_s
    client, servers = lent.cuts[0][0].name, names_of(offer.name for offer, _, _ in lent.cuts[1:])
    file = "has the whole file"
    if lent.fetch_bytes:
        file = f"needs the whole file and has to fetch about {lent.fetch_bytes / GB:.1f} GB of it"
    return Plan(
        model=lent.fitting.shape.digest,
        engine="rpc",
        stages=tuple(
            planned_stage(lent.fitting, cut, seconds) for cut, seconds in zip(lent.cuts, lent.computes_s, strict=True)
        ),
        tokens_per_s=rate,
        streams=wish.streams,
        streams_tokens_per_s=rate,
        prompt_tokens=wish.prompt_tokens,
        first_token_s=wish.prompt_tokens * lent.prompt_row_s,
        wire_s=lent.round_s - sum(lent.computes_s),
        learnt=False,
        exact=False,
        reasons=(
            f"llama.cpp's RPC, {why}: {client} computes with memory and cores of {servers}: {rate:.1f} tok/s",
            f"{client} {file} and sends the others their weights at every load",
        ),
    )
