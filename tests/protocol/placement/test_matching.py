"""Whether a node can ever run a task, in words for people, and which suits best."""

import pytest

from protocol.placement.commands import Capacity, Lent
from protocol.placement.matching import (
    Amounts,
    Condition,
    amounts_of,
    capacity_of,
    claim_of,
    judged,
    lacks,
    never_words,
)
from protocol.placement.tasks import Needs

GIB = 1 << 30
NO_NEEDS = Needs()
DESK = Lent(
    Capacity(8.0, 16 * GIB, 1, 8 * GIB, 100 * GIB, 8),
    "linux",
    "x86_64",
    "desk",
    ("attic",),
    "everyone",
    "",
    "bubblewrap",
)


def lent(**changes) -> Lent:
    return Lent(**{**{name: getattr(DESK, name) for name in DESK.__struct_fields__}, **changes})


@pytest.mark.parametrize(
    ("needs", "node", "words"),
    [
        (Needs(), DESK, []),
        (Needs(cpus=8.0, ram_bytes=16 * GIB, gpus=1, vram_bytes=8 * GIB, disk_bytes=100 * GIB), DESK, []),
        (Needs(cpus=9.0), DESK, ["it lends 8 CPUs at most, not 9"]),
        (Needs(ram_bytes=64 * GIB), DESK, ["it lends 16 GiB of RAM at most, not 64 GiB"]),
        (Needs(gpus=2), DESK, ["it lends 1 GPUs at most, not 2"]),
        (Needs(os="darwin"), DESK, ["it runs linux, not darwin"]),
        (Needs(arch="arm64"), DESK, ["it is x86_64, not arm64"]),
        (Needs(labels=("attic", "desk", "linux", "x86_64")), DESK, []),
        (Needs(labels=("name=desk", "os=linux", "arch=x86_64")), DESK, []),
        (Needs(labels=("name=other",)), DESK, ["it lacks the label name=other"]),
        (Needs(ram_bytes=24 * GIB), lent(most=Capacity(ram_bytes=32 * GIB)), []),
        (Needs(labels=("quiet", "loud")), DESK, ["it lacks the labels loud, quiet"]),
        (Needs(network=True), DESK, ["tasks get no network there (`tasks.network`)"]),
        (Needs(node="other"), DESK, ["it must run on another node"]),
        (Needs(), lent(accepts="nobody"), ["it takes tasks of nobody (`tasks.accept`)"]),
        (Needs(), lent(accepts="admins"), ["it takes tasks of admins (`tasks.accept`)"]),
        (Needs(), lent(isolation=""), ["it has no isolation (`meshnode doctor` there says what to do)"]),
        (Needs(), lent(closed="on battery"), []),
    ],
)
def test_what_a_node_lacks(needs: Needs, node: Lent, words: list) -> None:
    assert [lack.words for lack in lacks(needs, "member", "n1", node)] == words


def test_who_asks_matters() -> None:
    assert lacks(Needs(), "admin", "n1", lent(accepts="admins")) == []
    assert [lack.words for lack in lacks(Needs(), None, "n1", DESK)] == ["its submitter is no member"]


def test_the_closest_node_is_named_with_what_it_lacks() -> None:
    nodes = {"n1": lent(name="small", capacity=Capacity(1.0, GIB, 0, 0, GIB, 1)), "n2": DESK}
    assert never_words(Needs(ram_bytes=17 * GIB), "member", nodes) == (
        "none of 2 nodes can ever run it; desk comes closest: it lends 16 GiB of RAM at most, not 17 GiB"
    )
    assert never_words(Needs(), "member", nodes) == ""
    assert never_words(Needs(), "member", {}) == "no node takes tasks here yet"
    assert never_words(Needs(node="n9"), "member", nodes).startswith("it must run on n9, which is not here")
    assert (
        never_words(Needs(node="n1", gpus=1), "member", nodes)
        == "small can never run it: it lends 0 GPUs at most, not 1"
    )


def cost(needs: Needs = NO_NEEDS, *, node: str = "n1", failed_here: bool = False, **at) -> float:
    lends = amounts_of(DESK.capacity)._replace(gpus=0, vram_bytes=0)
    condition = Condition(**{"lends": lends, "free": lends, **at})
    return judged(needs, claim_of(needs), node, condition, failed_here=failed_here).cost


def test_what_speaks_for_a_node_and_what_against() -> None:
    plain = cost()
    half = amounts_of(DESK.capacity)._replace(gpus=0, vram_bytes=0, cpus_m=4000)
    assert cost(Needs(preferred="n1"), rtt_s=0.05) < plain
    assert cost(has_input=True) < plain
    for worse in (
        cost(free=half),
        cost(busy_pm=500),
        cost(rtt_s=0.01),
        cost(is_unhealthy=True),
        cost(is_probe=True),
        cost(failed_here=True),
        cost(lends=amounts_of(DESK.capacity), free=amounts_of(DESK.capacity)),
    ):
        assert worse > plain
    assert cost(Needs(gpus=1), lends=amounts_of(DESK.capacity), free=amounts_of(DESK.capacity)) < 1.2


def test_amounts_are_exact_and_nothing_asked_always_fits() -> None:
    tenth = claim_of(Needs(cpus=0.1))
    total = Amounts()
    for _ in range(10):
        total = total.plus(tenth)
    assert total == Amounts(1000, slots=10)
    assert claim_of(Needs(cpus=0.0)).within(Amounts(-500, -1, slots=1))
    assert not claim_of(Needs(cpus=0.1)).within(Amounts(50, slots=1))
    assert capacity_of(Amounts(-5, -5, -5, -5, -5, -5)) == Capacity()
    assert capacity_of(amounts_of(DESK.capacity)) == DESK.capacity
