"""Whether a node can ever run a task, whether it has room for it now, and which of those that have suits best.

What a node lends comes from its own report; what is promised beyond that is the books' (books.py). Amounts are whole
numbers (thousandths of a CPU), so that sums of them are exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from protocol.ids import NodeId
from protocol.placement.commands import Capacity, Lent
from protocol.placement.tasks import Needs
from protocol.trust.view import Role

LATENCY_WEIGHT_PER_S: Final = 20.0  # 10 ms away is as bad as a fifth of the machine in use
LATENCY_COST_MAX: Final = 2.0
BUSY_WEIGHT: Final = 0.5
PREFERRED_BONUS: Final = 4.0
INPUT_BONUS: Final = 0.5
FAILED_HERE_COST: Final = 3.0
UNHEALTHY_COST: Final = 1.0
PROBE_COST: Final = 1.5
GPU_WASTE_COST: Final = 0.3  # a node with GPUs for a task that asks for none


class Amounts(NamedTuple):
    """What a task takes, or a node lends. Adding and comparing is done element by element."""

    cpus_m: int = 0  # thousandths
    ram_bytes: int = 0
    gpus: int = 0
    vram_bytes: int = 0
    disk_bytes: int = 0
    slots: int = 0

    def plus(self, other: "Amounts") -> "Amounts":
        """The sum."""
        a, b, c, d, e, f = self
        u, v, w, x, y, z = other
        return Amounts(a + u, b + v, c + w, d + x, e + y, f + z)

    def minus(self, other: "Amounts") -> "Amounts":
        """The difference; it may be negative."""
        a, b, c, d, e, f = self
        u, v, w, x, y, z = other
        return Amounts(a - u, b - v, c - w, d - x, e - y, f - z)

    def within(self, other: "Amounts") -> bool:
        """Whether no element is larger. Nothing asked of a kind is within any, also one that is overdrawn."""
        a, b, c, d, e, f = self
        u, v, w, x, y, z = other
        return (
            (a <= u or not a)
            and (b <= v or not b)
            and (c <= w or not c)
            and (d <= x or not d)
            and (e <= y or not e)
            and (f <= z or not f)
        )


NOTHING: Final = Amounts()
_UNITS: Final = ("CPUs", "of RAM", "GPUs", "of GPU memory", "of disk", "slots")


def claim_of(needs: Needs) -> Amounts:
    """What a task with these needs takes while it runs."""
    cpus_m = round(needs.cpus * 1000)
    return Amounts(cpus_m, needs.ram_bytes, needs.gpus, needs.vram_bytes, needs.disk_bytes, 1)


def amounts_of(capacity: Capacity) -> Amounts:
    """The same of a report."""
    return Amounts(
        int(capacity.cpus * 1000 + 1e-6),
        capacity.ram_bytes,
        capacity.gpus,
        capacity.vram_bytes,
        capacity.disk_bytes,
        capacity.slots,
    )


def most_of(lent: Lent) -> Amounts:
    """The most that a node lends at any time: what decides whether it can ever run a task."""
    return Amounts(*map(max, amounts_of(lent.capacity), amounts_of(lent.most)))


def capacity_of(amounts: Amounts) -> Capacity:
    """As reports and figures spell it; nothing is below 0 there."""
    cpus_m, ram, gpus, vram, disk, slots = (max(0, amount) for amount in amounts)
    return Capacity(min(4096.0, cpus_m / 1000), ram, min(64, gpus), vram, disk, min(256, slots))


# ---- ever ------------------------------------------------------------------------------------------------------------


class Lack(NamedTuple):
    """One requirement that a node does not meet. `shortfall`: from 0 (nearly met) to 1 (nothing of it)."""

    words: str
    shortfall: float = 1.0


def lacks(needs: Needs, role: Role | None, node: NodeId, lent: Lent) -> list[Lack]:
    """What keeps that node from ever running it, as its owner has set it up; empty: nothing does."""
    found: list[Lack] = []
    if needs.node and needs.node != node:
        found.append(Lack("it must run on another node"))
    if role is None:
        found.append(Lack("its submitter is no member"))
    elif lent.accepts == "nobody" or (lent.accepts == "admins" and role != "admin"):
        found.append(Lack(f"it takes tasks of {lent.accepts} (`tasks.accept`)"))
    if not lent.isolation:
        found.append(Lack("it has no isolation (`meshnode doctor` there says what to do)"))
    if needs.os and needs.os != lent.os:
        found.append(Lack(f"it runs {lent.os or 'something unknown'}, not {needs.os}"))
    if needs.arch and needs.arch != lent.arch:
        found.append(Lack(f"it is {lent.arch or 'of unknown architecture'}, not {needs.arch}"))
    if needs.labels and (missing := sorted(set(needs.labels) - labels_of(lent))):
        found.append(Lack(f"it lacks the label{'s'[: len(missing) > 1]} {', '.join(missing)}"))
    if needs.network and not lent.network:
        found.append(Lack("tasks get no network there (`tasks.network`)"))
    for index, (wants, has) in enumerate(zip(claim_of(needs), most_of(lent), strict=True)):
        if wants > has:
            words = f"it lends {_spelled(index, has)} {_UNITS[index]} at most, not {_spelled(index, wants)}"
            found.append(Lack(words, (wants - has) / wants))
    return found


def labels_of(lent: Lent) -> set[str]:
    """All that may be asked for: its owner's labels, and its name, system and architecture, also as name=NAME."""
    told = {"name": lent.name, "os": lent.os, "arch": lent.arch}
    return {*lent.labels, *(value for value in told.values() if value), *(f"{key}={told[key]}" for key in told)}


def _spelled(index: int, amount: int) -> str:
    if index == 0:
        return f"{amount / 1000:g}"
    if index in (2, 5):
        return str(amount)
    for size, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if amount >= size:
            return f"{amount / size:.4g} {unit}"
    return f"{amount} B"


def never_words(needs: Needs, role: Role | None, nodes: Mapping[NodeId, Lent]) -> str:
    """Why none of these can ever run it, and which comes closest; empty: one can."""
    if not nodes:
        return "no node takes tasks here yet"
    if needs.node:
        if needs.node not in nodes:
            return f"it must run on {needs.node}, which is not here or takes no tasks"
        nodes = {NodeId(needs.node): nodes[NodeId(needs.node)]}
    best: tuple[float, str, NodeId, list[Lack]] | None = None
    for node, lent in nodes.items():
        found = lacks(needs, role, node, lent)
        if not found:
            return ""
        far = (sum(0.5 + lack.shortfall for lack in found), lent.name, node, found)
        if best is None or far[:3] < best[:3]:
            best = far
    assert best is not None  # there is a node, and it lacks something
    _, name, node, found = best
    reasons = "; ".join(lack.words for lack in found[:4])
    if len(nodes) == 1:
        return f"{name or node} can never run it: {reasons}"
    return f"none of {len(nodes)} nodes can ever run it; {name or node} comes closest: {reasons}"


# ---- now -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Condition:
    """What of a node counts for choosing it, besides what it lends. `is_probe`: its breaker is half open."""

    lends: Amounts
    free: Amounts
    busy_pm: int = 0
    rtt_s: float = 0.0
    is_unhealthy: bool = False  # throttled, hot or on battery
    is_probe: bool = False
    has_input: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """How much it speaks against the node (less is better), and the words that say why it was chosen."""

    cost: float
    words: str


def judged(needs: Needs, claim: Amounts, node: NodeId, at: Condition, *, failed_here: bool) -> Choice:
    """How well a node with room suits."""
    filled = max(
        (lends - free + wants) / lends
        for lends, free, wants in zip(at.lends, at.free, claim, strict=True)
        if lends and wants
    )
    cost = filled + BUSY_WEIGHT * at.busy_pm / 1000
    cost += min(LATENCY_COST_MAX, at.rtt_s * LATENCY_WEIGHT_PER_S)
    words = [f"{filled:.0%} of what it lends is taken with this"]
    if needs.preferred == node:
        cost -= PREFERRED_BONUS
        words.append("preferred")
    if at.has_input:
        cost -= INPUT_BONUS
        words.append("its input is there")
    if at.lends.gpus and not needs.gpus and not needs.vram_bytes:
        cost += GPU_WASTE_COST
    if at.is_unhealthy:
        cost += UNHEALTHY_COST
        words.append("throttled or on battery")
    if at.is_probe:
        cost += PROBE_COST
        words.append("on probation after failures")
    if failed_here:
        cost += FAILED_HERE_COST
        words.append("it failed there before")
    if at.rtt_s:
        words.append(f"{at.rtt_s * 1000:.1f} ms away")
    return Choice(cost, ", ".join(words))
