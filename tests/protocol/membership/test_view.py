"""The view against a naive model: whatever happens in whatever order, digest, bits and entries say who is up."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.membership.view import View, addresses_of, alive_of
from protocol.trust.view import members_in
from protocol.wire.messages import Alive
from tests.support.hub import Mesh, address_of

SIZE = 9
MESH = Mesh(SIZE)
ALIVES = {(index, inc): MESH.alive(index, incarnation=inc) for index in range(SIZE) for inc in range(3)}
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["up", "down", "left", "forget"]), st.integers(0, SIZE - 1), st.integers(0, 2), st.booleans()
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_the_view_is_what_a_naive_model_says(operations: list[tuple[str, int, int, bool]]) -> None:
    view = View(MESH.id(0), MESH.roster)
    state: dict[int, str] = {}
    newest: dict[int, Any] = {}
    for step, (what, index, incarnation, witnessed) in enumerate(operations):
        node = MESH.id(index)
        if what == "up":
            stated = ALIVES[index, incarnation]
            assert view.set_up(stated, step) is (state.get(index) != "up")
            state[index], newest[index] = "up", stated
        elif what == "forget":
            view.forget(node, step)
            state.pop(index, None)
            newest.pop(index, None)
        elif index in newest and (what == "left" or state[index] == "up"):  # the machine does nothing else
            if what == "down":
                proof = (MESH.accusation(1 if index != 1 else 2, index),) if witnessed else ()
                view.set_down(node, proof, step)
                state[index] = "down, witnessed" if proof else "down"
            else:
                view.set_left(node, MESH.leaving(index), step)
                state[index] = "left"
    up = {index for index, what in state.items() if what == "up"}
    digest = 0
    for index in up:
        digest ^= newest[index].token
    assert view.digest == digest
    assert {MESH.number(node) for node in view.up} == up
    assert sorted(view.peers) == sorted(MESH.id(index) for index in up - {0})
    assert {MESH.number(node) for node in view.down} == {i for i, what in state.items() if what.startswith("down")}
    assert view.witnessed_down() == sum(what == "down, witnessed" for what in state.values())
    assert {MESH.number(node) for node in view.left} == {i for i, what in state.items() if what == "left"}
    assert {MESH.number(node) for node in members_in(view.bits(), MESH.roster)} == up
    entries = view.entries()
    assert len(entries) == 4 * SIZE
    for position, member in enumerate(MESH.roster.members()):
        index = MESH.number(member)
        expected = (newest[index].token & 0xFFFFFFFF).to_bytes(4, "big") if index in up else bytes(4)
        assert entries[4 * position : 4 * position + 4] == expected
    for index in range(SIZE):
        rank = alive_of(newest[index]).incarnation if index in newest else None
        assert view.rank(MESH.id(index)) == ((0, 0) if rank is None else (100, rank))


@given(OPERATIONS, OPERATIONS)
def test_equal_digests_mean_equal_views(
    first: list[tuple[str, int, int, bool]], second: list[tuple[str, int, int, bool]]
) -> None:
    views = []
    for operations in (first, second):
        view = View(MESH.id(0), MESH.roster)
        for what, index, incarnation, _ in operations:
            if what == "up":
                view.set_up(ALIVES[index, incarnation], 0.0)
            elif what == "forget":
                view.forget(MESH.id(index), 0.0)
        views.append(view)
    a, b = views
    same = {n: a.rank(n) for n in a.up} == {n: b.rank(n) for n in b.up}
    assert (a.digest == b.digest) is same
    assert (a.entries() == b.entries()) is same


def test_a_change_of_who_is_up_is_dated_and_nothing_else_is() -> None:
    view = View(MESH.id(0), MESH.roster)
    view.set_up(ALIVES[1, 0], 5.0)
    assert view.changed_at == 5.0
    view.set_down(MESH.id(1), (), 6.0)
    assert view.changed_at == 6.0
    view.set_left(MESH.id(1), MESH.leaving(1), 7.0)
    view.forget(MESH.id(2), 8.0)
    assert view.changed_at == 6.0


def test_who_came_up_is_told_once_each_time() -> None:
    view = View(MESH.id(0), MESH.roster)
    view.set_up(ALIVES[1, 0], 5.0)
    assert view.arrivals() == [MESH.id(1)]
    assert view.arrivals() == []
    view.set_down(MESH.id(1), (), 6.0)
    view.set_up(ALIVES[1, 0], 7.0)
    assert view.arrivals() == [MESH.id(1)]


def test_addresses_that_are_no_addresses_are_left_out() -> None:
    good = MESH.alive(1, addresses=(address_of(1), address_of(2)))
    alive = alive_of(good)
    odd = Alive(alive.signer, 1, 1, 1, 1, [*alive.addresses, b"\x01" * 7, b"\x02" * 17])
    assert addresses_of(odd) == (address_of(1), address_of(2))


def test_bits_beyond_the_roster_name_nobody() -> None:
    assert list(members_in(1 << 4000, MESH.roster)) == []
    assert len(list(members_in((1 << 4000) - 1, MESH.roster))) == SIZE


def test_only_alive_statements_are_alive() -> None:
    with pytest.raises(TypeError):
        alive_of(MESH.leaving(1))
