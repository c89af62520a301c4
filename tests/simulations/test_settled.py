"""Tables that are told once, and meshes that begin with full views."""

from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from protocol.node import Node
from simulations.computer import Computer
from simulations.overlay import Overlay
from simulations.scenarios.scenario import Mesh, Options, mesh

NODES = 24

_steps = st.lists(st.tuples(st.sampled_from(("set", "pop", "get")), st.integers(0, 7), st.integers(0, 3)), max_size=40)


@given(st.lists(st.integers(0, 7), unique=True), _steps)
def test_an_overlay_behaves_as_the_dict_that_it_stands_for(keys: list[int], steps: list[tuple[str, int, int]]) -> None:
    base = dict.fromkeys(keys, 9)
    plain, overlay = dict(base), Overlay(base)
    for step, key, value in steps:
        if step == "set":
            plain[key] = overlay[key] = value
        elif step == "pop":
            assert overlay.pop(key, None) == plain.pop(key, None)
        assert (overlay.get(key), key in overlay, len(overlay)) == (plain.get(key), key in plain, len(plain))
        assert list(overlay.items()) == list(plain.items())
    assert base == dict.fromkeys(keys, 9)


def joined() -> Mesh:
    made = mesh(Options(NODES, 5))
    made.world.spawn(NODES)
    made.world.run(1.0)
    made.settle()
    return made


def settled() -> Mesh:
    made = mesh(Options(NODES, 5), is_settled=True)
    made.start_settled(NODES)
    made.world.run(1.0)
    return made


def tables(computer: Computer) -> dict[str, object]:
    """What a node knows of its peers, in the forms in which its machines keep it."""
    node = cast(Node, computer.machine)
    view, contest = node.membership.view, node.election._contest
    return {
        "up": set(view.up),
        "peers": sorted(view.peers),
        "known": {peer: stated.body for peer, stated in view.known.items()},
        "digest": view.digest,
        "heartbeats": list(node.heartbeats._order),
        "keys": set(node.keyring._up),
        "records": set(node.records._up),
        "boots": {peer: node.datagrams._boots[peer] for peer in view.peers},
        "candidates": dict(contest._candidates.up),
        "better": contest._candidates.better,
        "deputies": contest._candidates.deputies(None),
    }


def test_a_settled_mesh_knows_what_a_mesh_that_joined_knows() -> None:
    one, other = joined(), settled()
    for left, right in zip(one.computers, other.computers, strict=True):
        assert tables(left) == tables(right)
        peers = set(tables(left)["keys"])  # type: ignore[call-overload]  # a set, see above
        assert set(left.disk.snapshot()["membership"]) <= set(right.disk.snapshot()["membership"])
        assert len(peers) == NODES - 1
    assert other.views.wrong == 0


def test_a_settled_mesh_elects_finds_deaths_and_takes_back_who_restarts() -> None:
    made = settled()
    made.world.run(15.0)
    leaders = {cast(Node, computer.machine).election.coordinator for computer in made.computers}
    assert len(leaders) == 1
    assert None not in leaders
    victim = made.computers[7]
    victim.crash(power=True)
    took = made.world.run_until(lambda: made.views.wrong == 0, 12.0)
    assert took is not None
    assert took > 1.0
    assert {verdict.target for verdict in made.views.verdicts} == {7}
    victim.start()
    assert made.views.wrong > 0
    assert made.world.run_until(lambda: made.views.wrong == 0, 12.0) is not None
    made.world.finish()
