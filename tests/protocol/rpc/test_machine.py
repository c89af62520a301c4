"""The call machine: tables of what it does, and a random walk against a model of what must hold."""

import random

import msgspec
import pytest

from protocol.effects import CloseLink, LinkLost, LinkOpened, SendFrame, SetTimer, TimerFired
from protocol.ids import node_id_of
from protocol.rpc.events import (
    CallAbandoned,
    CallFailed,
    CallRequested,
    CallSucceeded,
    InvocationDone,
    InvocationEnded,
    InvocationFailed,
    Invoke,
    RpcEffect,
    RpcReceived,
    Withdraw,
)
from protocol.rpc.machine import RPC_TIMER, RpcMachine, RpcParams
from protocol.rpc.messages import (
    RPC_BODY_BYTES_MAX,
    Cancel,
    Failure,
    Reply,
    Request,
    RpcMessage,
    decode_rpc,
    encode_rpc,
)
from protocol.wire.frames import FRAME_PAYLOAD_BYTES_MAX, RemoteProtocolError

A, B = node_id_of(b"a" * 32), node_id_of(b"b" * 32)


def opened(params: RpcParams | None = None) -> RpcMachine:
    machine = RpcMachine(params=params)
    assert machine.handle(LinkOpened(B, 1), 0.0) == []
    return machine


def sent(effects: list[RpcEffect]) -> list[RpcMessage]:
    return [decode_rpc(effect.data) for effect in effects if isinstance(effect, SendFrame)]


def got(machine: RpcMachine, message: RpcMessage, now: float = 0.0) -> list[RpcEffect]:
    return machine.handle(RpcReceived(B, encode_rpc(message)), now)


def requested(machine: RpcMachine, call: int = 1, *, deadline: float = 5.0, now: float = 0.0) -> list[RpcEffect]:
    return machine.handle(CallRequested(call, B, "do", b"x", deadline), now)


def test_a_call_is_numbered_timed_and_answered_once() -> None:
    machine = opened()
    effects = requested(machine, 7, deadline=5.0, now=2.0)
    assert sent(effects) == [Request(1, "do", 3000, b"x")]
    assert effects[-1] == SetTimer(RPC_TIMER, 5.0)
    assert machine.is_busy(B)
    assert got(machine, Reply(1, b"y")) == [CallSucceeded(7, b"y")]
    assert not machine.is_busy(B)
    assert got(machine, Reply(1, b"y")) == []
    assert machine.late_replies == 1
    assert sent(requested(machine, 8))[0] == Request(2, "do", 5000, b"x")


def test_a_failure_carries_everything_over() -> None:
    machine = opened()
    requested(machine, 7)
    effects = got(machine, Failure(1, "disk_full", "No room.", True, b'{"free":3}'))
    assert effects == [CallFailed(7, "disk_full", "No room.", True, detail=b'{"free":3}')]


def test_a_deadline_fails_the_call_and_cancels_it_there_and_the_late_reply_is_nothing() -> None:
    machine = opened()
    requested(machine, 7, deadline=1.0)
    requested(machine, 8, deadline=2.0)
    effects = machine.handle(TimerFired(RPC_TIMER), 1.0)
    failed = effects[0]
    assert isinstance(failed, CallFailed)
    assert (failed.call, failed.code, failed.retryable) == (7, "timeout", True)
    assert sent(effects) == [Cancel(1)]
    assert effects[-1] == SetTimer(RPC_TIMER, 2.0)
    assert got(machine, Reply(1, b"late")) == []
    assert got(machine, Reply(2, b"fine")) == [CallSucceeded(8, b"fine")]


def test_an_abandoned_call_is_cancelled_there() -> None:
    machine = opened()
    requested(machine, 7)
    assert sent(machine.handle(CallAbandoned(7), 0.0)) == [Cancel(1)]
    assert machine.handle(CallAbandoned(7), 0.0) == []
    assert got(machine, Reply(1, b"late")) == []
    assert machine.pending_calls == 0


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (CallRequested(1, A, "do", b"", 5.0), "unreachable"),
        (CallRequested(1, B, "do", bytes(RPC_BODY_BYTES_MAX + 1), 5.0), "too_large"),
        (CallRequested(1, B, "m" * 65, b"", 5.0), "too_large"),
        (CallRequested(1, B, "do", b"", 0.0), "timeout"),
    ],
)
def test_what_cannot_be_sent_fails_at_once(event: CallRequested, code: str) -> None:
    machine = opened()
    (effect,) = machine.handle(event, 1.0)
    assert isinstance(effect, CallFailed)
    assert effect.code == code
    assert machine.pending_calls == 0


def test_the_biggest_body_fits_a_frame_in_both_directions() -> None:
    body = bytes(RPC_BODY_BYTES_MAX)
    request = Request(2**53, "m" * 64, 24 * 3600 * 1000, body)
    assert len(encode_rpc(request)) <= FRAME_PAYLOAD_BYTES_MAX
    assert len(encode_rpc(Reply(2**53, body))) <= FRAME_PAYLOAD_BYTES_MAX
    machine = opened()
    got(machine, Request(1, "do", 1000, b""))
    (failure,) = sent(machine.handle(InvocationDone(1, body + b"x"), 0.0))
    assert isinstance(failure, Failure)
    assert failure.code == "too_large"


def test_pending_calls_are_bounded() -> None:
    machine = opened(RpcParams(pending_max=2))
    requested(machine, 1)
    requested(machine, 2)
    (effect,) = requested(machine, 3)
    assert isinstance(effect, CallFailed)
    assert (effect.code, effect.retryable) == ("overloaded", True)
    got(machine, Reply(1, b""))
    assert sent(requested(machine, 4))


def test_a_request_is_invoked_and_its_answer_sent() -> None:
    machine = opened()
    (invoke, timer) = got(machine, Request(4, "do", 1500, b"x"), now=10.0)
    assert invoke == Invoke(1, B, "do", b"x", 11.5)
    assert timer == SetTimer(RPC_TIMER, 11.5)
    assert machine.is_busy(B)
    assert sent(machine.handle(InvocationDone(1, b"y"), 10.1)) == [Reply(4, b"y")]
    assert machine.handle(InvocationEnded(1), 10.1) == []
    assert not machine.is_busy(B)
    got(machine, Request(5, "do", 1500, b"x"), now=10.0)
    failed = InvocationFailed(2, "c" * 99, "m" * 9999, False, b"d" * 99999)
    (failure,) = sent(machine.handle(failed, 10.1))
    assert failure == Failure(5, "c" * 64, "m" * 2048, False, b"")


def test_a_cancelled_invocation_sends_nothing_and_holds_its_slot_until_it_ends() -> None:
    machine = opened(RpcParams(serving_max=1, withdrawn_max=1))
    got(machine, Request(1, "do", 1500, b"x"))
    assert got(machine, Cancel(1)) == [Withdraw(1)]
    assert got(machine, Cancel(1)) == []
    assert got(machine, Cancel(99)) == []
    assert machine.open_invocations == 1
    (failure,) = sent(got(machine, Request(2, "do", 1500, b"x")))
    assert isinstance(failure, Failure)
    assert (failure.code, failure.retryable) == ("overloaded", True)
    assert machine.handle(InvocationDone(1, b"too late"), 0.0) == []
    assert machine.open_invocations == 0
    assert isinstance(got(machine, Request(3, "do", 1500, b"x"))[0], Invoke)


def test_an_invocation_past_its_deadline_is_withdrawn_and_the_caller_told() -> None:
    machine = opened()
    got(machine, Request(1, "do", 1500, b"x"))
    effects = machine.handle(TimerFired(RPC_TIMER), 1.5)
    assert effects[0] == Withdraw(1)
    (failure,) = sent(effects)
    assert isinstance(failure, Failure)
    assert failure.code == "timeout"
    assert machine.handle(InvocationEnded(1), 1.6) == []
    assert machine.open_invocations == 0


def test_serving_is_bounded_by_number_and_by_bytes() -> None:
    machine = opened(RpcParams(serving_max=2, serving_bytes_max=100))
    assert isinstance(got(machine, Request(1, "do", 1500, bytes(60)))[0], Invoke)
    (failure,) = sent(got(machine, Request(2, "do", 1500, bytes(60))))
    assert isinstance(failure, Failure)
    assert isinstance(got(machine, Request(3, "do", 1500, bytes(40)))[0], Invoke)
    (failure,) = sent(got(machine, Request(4, "do", 1500, b"")))
    assert isinstance(failure, Failure)
    machine.handle(InvocationDone(1, b""), 0.0)
    assert isinstance(got(machine, Request(5, "do", 1500, bytes(60)))[0], Invoke)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        encode_rpc(Request(3, "do", 1000, b"")),
        encode_rpc(Request(2, "do", 1000, b"")),
        encode_rpc(Reply(1, b"to nothing")),
        encode_rpc(Failure(1, "x", "y", True)),
        msgspec.msgpack.encode([9, 1]),
        msgspec.msgpack.encode([1, 0, "do", 1, b""]),
        msgspec.msgpack.encode([1, 9, "m" * 65, 1, b""]),
        msgspec.msgpack.encode([1, 9, "do", -1, b""]),
        b"\x95\x01\x09\xa2do\x01\xc6\xff\xff\xff\xff",
        b"\x95\x04\x01" + b"\x91" * 5000,
    ],
)
def test_a_peer_that_breaks_the_rules_loses_the_link(payload: bytes) -> None:
    machine = opened()
    got(machine, Request(3, "do", 1000, b""))
    effects = machine.handle(RpcReceived(B, payload), 0.0)
    assert [type(effect) for effect in effects] == [CloseLink]


def test_frames_of_a_link_that_is_gone_are_nothing() -> None:
    machine = RpcMachine()
    assert got(machine, Request(1, "do", 1000, b"")) == []


def test_a_lost_link_fails_its_calls_withdraws_its_handlers_and_starts_afresh() -> None:
    machine = opened()
    requested(machine, 7)
    got(machine, Request(5, "do", 1000, b""))
    effects = machine.handle(LinkLost(B, "gone"), 0.0)
    failed, withdrawn = effects
    assert isinstance(failed, CallFailed)
    assert (failed.call, failed.code) == (7, "unreachable")
    assert "gone" in failed.message
    assert withdrawn == Withdraw(1)
    assert machine.handle(LinkLost(B, "gone"), 0.0) == []
    machine.handle(LinkOpened(B, 2), 0.0)
    # Ids begin again, and the old handler's answer does not go out on the new link.
    assert isinstance(got(machine, Request(1, "do", 1000, b""))[0], Invoke)
    assert machine.handle(InvocationDone(1, b"old"), 0.0) == []
    assert sent(machine.handle(InvocationDone(2, b"new"), 0.0)) == [Reply(1, b"new")]


def test_deadlines_of_ended_calls_do_not_pile_up() -> None:
    machine = opened()
    for call in range(1, 5001):
        requested(machine, call, deadline=1000.0 + call)
        got(machine, Reply(call, b""))
    assert len(machine._timers) < 200


def test_what_two_machines_do_to_each_other_under_random_events_holds() -> None:
    """Two machines over a lossy history: every call ends exactly once, nothing runs twice, nothing stays behind."""
    for seed in range(40):
        _walk(random.Random(seed))


def _walk(rng: random.Random) -> None:
    params = RpcParams(pending_max=6, serving_max=6, withdrawn_max=50)
    machines = {A: RpcMachine(params=params), B: RpcMachine(params=params)}
    wire: dict[object, list[bytes]] = {A: [], B: []}
    running: dict[object, dict[int, Invoke]] = {A: {}, B: {}}
    ended: dict[object, set[int]] = {A: set(), B: set()}
    asked: dict[object, set[int]] = {A: set(), B: set()}
    executed: set[bytes] = set()
    other = {A: B, B: A}
    now, call, link = 0.0, 0, 0

    def perform(me: object, effects: list[RpcEffect]) -> None:
        for effect in effects:
            match effect:
                case SendFrame(_, data):
                    wire[me].append(data)
                case CallSucceeded(number) | CallFailed(number):
                    assert number not in ended[me]
                    ended[me].add(number)
                case Invoke():
                    assert effect.body not in executed
                    executed.add(effect.body)
                    running[me][effect.invocation] = effect
                case CloseLink():
                    raise AssertionError("two machines of ours never break the rules")
                case _:
                    pass

    def reopen() -> None:
        nonlocal link
        link += 1
        for me in (A, B):
            wire[me].clear()
            perform(me, machines[me].handle(LinkLost(other[me], "cut"), now))
            perform(me, machines[me].handle(LinkOpened(other[me], link), now))

    reopen()
    for _ in range(400):
        me = rng.choice((A, B))
        match rng.randrange(8):
            case 0 | 1:
                call += 1
                asked[me].add(call)
                deadline = now + rng.uniform(0.1, 5)
                event = CallRequested(call, other[me], "do", b"%d" % call, deadline)
                perform(me, machines[me].handle(event, now))
            case 2 | 3 | 4 if wire[me]:
                perform(other[me], machines[other[me]].handle(RpcReceived(me, wire[me].pop(0)), now))
            case 5 if running[me]:
                number = rng.choice(list(running[me]))
                del running[me][number]
                result = rng.choice((InvocationDone(number, b"ok"), InvocationEnded(number)))
                perform(me, machines[me].handle(result, now))
            case 6:
                open_calls = asked[me] - ended[me]
                if open_calls and rng.random() < 0.3:
                    gone = rng.choice(sorted(open_calls))
                    ended[me].add(gone)
                    perform(me, machines[me].handle(CallAbandoned(gone), now))
            case 7:
                now += rng.uniform(0, 1)
                for one in (A, B):
                    perform(one, machines[one].handle(TimerFired(RPC_TIMER), now))
                if rng.random() < 0.05:
                    reopen()
            case _:
                pass
    now += 10
    for one in (A, B):
        perform(one, machines[one].handle(TimerFired(RPC_TIMER), now))
        for number in list(running[one]):
            machines[one].handle(InvocationEnded(number), now)
        assert ended[one] == asked[one]
        assert machines[one].pending_calls == machines[one].open_invocations == 0


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (Request(1, "ping", 1500, b"\x01"), "950101a470696e67cd05dcc40101"),
        (Reply(1, b"\x02"), "930201c40102"),
        (Failure(1, "timeout", "Late.", True, b"{}"), "960301a774696d656f7574a54c6174652ec3c4027b7d"),
        (Cancel(1), "920401"),
    ],
)
def test_the_bytes_of_every_message_stay_what_they_are(message: RpcMessage, payload: str) -> None:
    """Peers of another version speak these very bytes: a change here is a new protocol version."""
    assert encode_rpc(message).hex() == payload
    assert decode_rpc(bytes.fromhex(payload)) == message


def test_messages_ignore_what_a_later_version_appends() -> None:
    for message in (Request(1, "m", 5, b"b"), Reply(1, b"b"), Failure(1, "c", "m", True, b"{}"), Cancel(3)):
        longer = msgspec.msgpack.encode([*msgspec.msgpack.decode(encode_rpc(message)), {"news": 1}])
        assert decode_rpc(longer) == message


def test_two_thousand_hostile_frames_close_the_link_or_do_nothing_worse() -> None:
    rng = random.Random(7)
    templates = [
        encode_rpc(message)
        for message in (Request(9, "do", 500, b"x" * 30), Reply(1, b"y"), Failure(1, "c", "m", True, b"{}"), Cancel(4))
    ]
    closed = 0
    for _ in range(2_000):
        machine = opened()
        requested(machine, 1)
        data = bytearray(rng.choice(templates))
        for _ in range(rng.randrange(1, 6)):
            if rng.random() < 0.7:
                data[rng.randrange(len(data))] = rng.randrange(256)
            else:
                at = rng.randrange(len(data))
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
        effects = machine.handle(RpcReceived(B, bytes(data)), 0.0)
        closed += any(isinstance(effect, CloseLink) for effect in effects)
        assert machine.pending_calls <= 1
        assert machine.open_invocations <= 1
    assert closed > 500


def test_a_message_that_is_none_is_one_kind_of_error() -> None:
    with pytest.raises(RemoteProtocolError):
        decode_rpc(b"\x93\x03\x01\xa1x")
