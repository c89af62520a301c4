"""Submissions made into orders: what is taken, and what is said about what is not."""

import base64
from typing import Any

import msgspec
import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.tasks.core.submitting import command_text, input_of, order_of, same_wish
from meshnode.tasks.model import Requirements, Submission
from protocol.ids import NodeId
from protocol.placement.tasks import ORDER_BYTES_MAX, Needs, Order, task_collections, task_key

ME, OTHER = NodeId("a" * 32), NodeId("b" * 32)
TASK = "0123456789abcdef"


def find(wanted: str) -> NodeId:
    known = {"barn": OTHER, OTHER: OTHER}
    if wanted not in known:
        raise MeshError(ErrorCode.UNKNOWN_NODE, f"No node of this mesh is called {wanted!r}.")
    return known[wanted]


def made(**fields: Any) -> Order:
    # As the API does it: what JSON says is what is tested.
    said = msgspec.convert({"command": "true", **fields}, Submission)
    return order_of(said, task=TASK, me=ME, at_ms=5, find_node=find)


def test_a_list_stays_a_list_and_a_string_is_for_the_shell() -> None:
    assert made(command=["printf", "%s\n", "a b"]).argv == ("printf", "%s\n", "a b")
    assert (made(command="ls | wc").shell, made(command="ls | wc").argv) == ("ls | wc", ())
    assert command_text(made(command=["printf", "a b"])) == "printf 'a b'"


def test_all_that_can_be_said_arrives_in_the_order() -> None:
    order = made(
        env=["A=1", "B=x=y\nz", "A=2"], node="barn", preferred_node=OTHER, mode="at_least_once", retries=3,
        timeout=1.5, priority="high", stdin_base64=base64.b64encode(b"\0in").decode(), name="n", idempotency_key="k",
        output_bytes_max=7, keep_s=8.0, group="g",
        requirements={"cpus": 2, "ram_bytes": 3, "gpus": 1, "vram_bytes": 4, "disk_bytes": 5, "os": "linux",
                      "arch": "x86_64", "labels": ["gpu=big"], "network": True},
    )  # fmt: skip
    needs = Needs(2, 3, 1, 4, 5, "linux", "amd64", ("gpu=big",), OTHER, OTHER, True)
    assert order == Order(
        TASK, ME, 5, shell="true", env=(("A", "2"), ("B", "x=y\nz")), stdin=b"\0in", needs=needs, retries=3,
        timeout_s=1.5, priority=2, name="n", output_bytes_max=7, keep_s=8.0, key="k", group="g",
    )  # fmt: skip


def test_the_hints_of_other_clients_are_honoured() -> None:
    order = made(hints={"priority": "low", "min_ram_mb": "64", "node": "barn"}, requirements={"ram_bytes": 5})
    assert (order.priority, order.needs.ram_bytes, order.needs.preferred) == (0, 64 * 1024**2, OTHER)


def test_variables_may_be_an_object() -> None:
    said = Submission(command="true", env={"A": "1", "B": "x=y"})
    assert order_of(said, task=TASK, me=ME, at_ms=5, find_node=str).env == (("A", "1"), ("B", "x=y"))


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"command": ""}, "bad_request", "empty"),
        ({"command": " \n"}, "bad_request", "empty"),
        ({"command": []}, "bad_request", "empty"),
        ({"command": ["", "x"]}, "bad_request", "empty"),
        ({"command": "a\0b"}, "bad_request", "NUL"),
        ({"command": ["a", "\0"]}, "bad_request", "command[1]"),
        ({"command": ["a", "\ud800"]}, "bad_request", "surrogate"),
        ({"command": ["a"] * 5000}, "too_large", "5000 arguments"),
        ({"command": ["x", "y" * 1024 * 1024]}, "too_large", "standard input"),
        ({"env": ["A"]}, "bad_request", "KEY=VALUE"),
        ({"env": {"A=B": "x"}}, "bad_request", "'A=B'"),
        ({"env": {"": "x"}}, "bad_request", "not empty"),
        ({"env": {"A": "\0"}}, "bad_request", "NUL"),
        ({"env": ["=v"]}, "bad_request", "KEY=VALUE"),
        ({"env": ["A=\0"]}, "bad_request", "NUL"),
        ({"env": [f"A{n}=" for n in range(600)]}, "too_large", "600"),
        ({"mode": "twice"}, "bad_request", "'twice'"),
        ({"mode": "at_most_once", "retries": 1}, "bad_request", "never started again"),
        ({"retries": -1}, "bad_request", "`retries` is -1"),
        ({"retries": 1000}, "bad_request", "`retries`"),
        ({"timeout": -0.5}, "bad_request", "`timeout`"),
        ({"timeout": float("nan")}, "bad_request", "`timeout`"),
        ({"timeout": float("inf")}, "bad_request", "`timeout`"),
        ({"keep_s": -1.0}, "bad_request", "`keep_s`"),
        ({"output_bytes_max": -1}, "bad_request", "`output_bytes_max`"),
        ({"requirements": {"cpus": -1}}, "bad_request", "`requirements.cpus`"),
        ({"requirements": {"ram_bytes": 2**60}}, "bad_request", "`requirements.ram_bytes`"),
        ({"requirements": {"labels": ["x"] * 40}}, "bad_request", "labels"),
        ({"priority": "urgent"}, "bad_request", "background, normal"),
        ({"hints": {"colour": "red"}}, "bad_request", "hints.colour"),
        ({"hints": {"min_ram_mb": "lots"}}, "bad_request", "min_ram_mb"),
        ({"hints": {"node": "barn"}, "preferred_node": "barn"}, "bad_request", "the same"),
        ({"node": "bern"}, "unknown_node", "bern"),
        ({"stdin": "a", "stdin_base64": "YQ=="}, "bad_request", "exclude"),
        ({"stdin_base64": "?"}, "bad_request", "base64"),
        ({"stdin": "x" * 20_000}, "too_large", "20000 bytes"),
        ({"name": "a\x1b[31m"}, "bad_request", "`name`"),
        ({"name": "a" * 200}, "bad_request", "`name`"),
        ({"idempotency_key": "a" * 200}, "bad_request", "`idempotency_key`"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_made(fields: dict[str, Any], code: str, word: str) -> None:
    with pytest.raises(MeshError) as refused:
        made(**fields)
    assert refused.value.code.value == code
    assert word in refused.value.message
    assert len(refused.value.message) < 400  # an argument of a megabyte is not repeated


def test_the_largest_order_is_one_that_the_records_take() -> None:
    orders = task_collections()[0]
    room = ORDER_BYTES_MAX - len(msgspec.msgpack.encode(made(command=["x", "y" * 1000]))) + 1000
    order = made(command=["x", "y" * room])
    value = msgspec.msgpack.encode(order)
    assert ORDER_BYTES_MAX - 8 <= len(value) <= orders.value_bytes_max
    assert orders.may_write(ME, "member", task_key(ME, TASK), value)
    with pytest.raises(MeshError):
        made(command=["x", "y" * (room + 8)])


def test_an_input_that_was_sent_ahead_counts_as_disk_and_is_taken_by_the_records() -> None:
    may_write = task_collections()[0].may_write
    said = Submission(command="wc", input="ab" * 32, requirements=Requirements(disk_bytes=5))
    sha256 = input_of(said)
    assert sha256 == b"\xab" * 32
    order = order_of(said, task=TASK, me=ME, at_ms=5, find_node=find, sent=(sha256, 20_000))
    assert (order.stdin_bytes, order.stdin_sha256, order.needs.disk_bytes) == (20_000, sha256, 20_005)

    def taken(**changes: Any) -> bool:
        value = msgspec.msgpack.encode(msgspec.structs.replace(order, **changes))
        return may_write(ME, "member", task_key(ME, TASK), value)

    assert taken()
    assert taken(stdin_holders=(OTHER,))
    for wrong in (
        {"stdin_bytes": 100},
        {"stdin_bytes": 0},
        {"stdin_bytes": 20_006},
        {"stdin_sha256": b"short"},
        {"stdin": b"x"},
        {"stdin_holders": (OTHER,) * 5},
        {"stdin_bytes": 2**41, "needs": Needs(disk_bytes=2**42)},
    ):
        assert not taken(**wrong), wrong
    again = msgspec.structs.replace(order, stdin_holders=(OTHER,))
    assert same_wish(order, again)


@pytest.mark.parametrize("fields", [{"input": "AB" * 32}, {"input": "../x"}, {"input": "ab" * 32, "stdin": "x"}])
def test_an_input_has_a_name_and_excludes_others(fields: dict[str, Any]) -> None:
    with pytest.raises(MeshError) as refused:
        input_of(Submission(command="wc", **fields))
    assert refused.value.code is ErrorCode.BAD_REQUEST
    assert "`input`" in refused.value.message
    assert input_of(Submission(command="wc")) is None


def test_the_same_wish_at_another_time_is_the_same() -> None:
    order = made(idempotency_key="k")
    assert same_wish(order, msgspec.structs.replace(order, task="f" * 16, at_ms=99))
    assert not same_wish(order, made(idempotency_key="k", retries=1))
