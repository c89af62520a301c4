"""A session at its entry: every token once, whatever stages do; ended within bounded time; liars named, others not."""

from itertools import pairwise

import pytest

from protocol.membership.events import PeerDown
from protocol.sharding.events import (
    FINISH_EOG,
    FINISH_ERROR,
    FINISH_LENGTH,
    Accuse,
    CancelSession,
    ClientLeft,
    Emit,
    Ensure,
    EnsureAnswered,
    EnsureFailed,
    Fail,
    Finish,
    OpenSession,
    PiecesReceived,
    Progressed,
    SessionAccepted,
    SessionRefused,
    StageErred,
    StopFound,
    StreamLost,
)
from protocol.sharding.pipelines import FEW_NODES, NO_ENGINE, Loading, Pipeline, Ready, Refused, Span
from tests.protocol.sharding.entry import PROMPT, Entry, kinds, pipeline, streaming


def test_from_wish_to_finish() -> None:
    entry = Entry()
    assert entry.out[0] == Ensure(1, "model", 100)
    entry.ready("a", "b", "c")
    assert entry.last(OpenSession) == OpenSession("a", b"s" * 14 + b"\1\0", b"pipeline", PROMPT, ())
    entry.tell(SessionAccepted("a", entry.session.id, 2))
    assert entry.pieces(0, 10)[0] == Emit(0, (10,), (b"10",))
    entry.pieces(1, 11, 12)
    assert kinds(entry.pieces(3, finish=FINISH_EOG)) == [Finish]
    assert entry.last(Finish) == Finish("stop", 3, 2)
    assert entry.emitted == [10, 11, 12]
    assert not entry.timers


def test_a_pipeline_that_was_just_named_is_not_asked_for_again() -> None:
    named = pipeline("a", "b", "c")
    entry = Entry(named=named)
    assert kinds(entry.out) == [OpenSession]
    assert entry.session.pipeline == named
    assert entry.emitted == []
    entry.tell(StreamLost("c", "gone"))
    entry.ready("a", "b", "d")
    entry.pieces(0, 10, peer="d", finish=FINISH_EOG)
    assert entry.emitted == [10]


@pytest.mark.parametrize(
    ("named", "stages_min"), [(pipeline("a", "b", context=99), 1), (pipeline("a", "b"), 3)], ids=["short", "few stages"]
)
def test_one_that_does_not_suit_is(named: Pipeline, stages_min: int) -> None:
    assert kinds(Entry(named=named, stages_min=stages_min).out) == [Ensure]


def test_tokens_may_come_before_the_acceptance() -> None:
    """Streams of different peers are not ordered among themselves."""
    entry = Entry()
    entry.ready("a", "b", "c")
    entry.pieces(0, 10)
    entry.tell(SessionAccepted("a", entry.session.id))
    assert entry.session.state == "streaming"


def test_the_last_wanted_token_ends_it_even_if_the_stage_does_not_say_so() -> None:
    entry = streaming(max_tokens=4)
    assert kinds(entry.pieces(3, 13)) == [Emit, CancelSession, Finish]
    assert entry.last(Finish).reason == "length"


def test_what_came_already_is_not_emitted_again() -> None:
    entry = streaming()
    entry.pieces(1, 11, 12, 13)
    assert entry.emitted == [10, 11, 12, 13]
    entry.pieces(0, 10, 11)
    assert entry.emitted == [10, 11, 12, 13]


@pytest.mark.parametrize(
    "loss",
    [
        PeerDown("b", ("x", "y")),
        StreamLost("a", "reset"),
        StreamLost("c", "reset"),
        "error",
        "silence",
        "finish",
        "gap",
    ],
)
def test_whatever_breaks_it_goes_on_where_it_was(loss) -> None:
    entry = streaming()
    before = entry.session.id
    if loss == "error":
        entry.tell(StageErred("b", before, "internal", "crashed"))
    elif loss == "silence":
        entry.wait(4.6)
    elif loss == "finish":
        entry.pieces(3, finish=FINISH_ERROR)
    elif loss == "gap":
        entry.pieces(5, 15)
    else:
        entry.tell(loss)
    ask = entry.last(Ensure)
    assert ask.ask == 2
    assert ask.complaint[0] == b"pipeline"
    assert entry.last(CancelSession) == CancelSession("a", before)
    entry.ready("d", "e", name=b"another1")
    opened = entry.last(OpenSession)
    assert (opened.to, opened.prompt, opened.generated) == ("d", PROMPT, (10, 11, 12))
    assert opened.session == b"s" * 14 + b"\2\0"
    assert kinds(entry.pieces(3, 13, session=before)) == []
    entry.pieces(3, 13, peer="e", finish=FINISH_EOG)
    assert entry.emitted == [10, 11, 12, 13]
    assert entry.last(Finish).reason == "stop"


def test_the_dead_are_avoided_and_not_sent_to() -> None:
    entry = streaming()
    effects = entry.tell(PeerDown("a", ("x", "y")))
    assert kinds(effects) == [Ensure]
    assert entry.last(Ensure).without == ("a",)


def test_a_loss_that_is_not_its_business_changes_nothing() -> None:
    entry = streaming()
    assert entry.tell(PeerDown("z", ("x", "y"))) == []
    assert entry.tell(StreamLost("b", "its own")) == []


def test_silence_is_noticed_within_five_seconds_and_signs_of_life_are_heard() -> None:
    entry = Entry()
    entry.ready("a", "b", "c")
    for _ in range(30):
        assert kinds(entry.wait(1.0)) == []
        entry.pieces(0)
    assert kinds(entry.wait(4.0)) == []
    assert Ensure in kinds(entry.wait(1.0))


def test_signs_of_life_without_tokens_do_not_last_for_ever() -> None:
    entry = streaming(tokenless_s=60.0)
    seen: list = []
    for _ in range(62):
        seen += entry.wait(1.0)
        if entry.session.state == "streaming":
            entry.pieces(3)
    assert Ensure in kinds(seen)


@pytest.mark.parametrize(
    ("index", "tokens", "pieces", "finish"),
    [
        (-1, (1,), (b"1",), 0),
        (1, (99, 12), (b"99", b"12"), 0),
        (3, (1000,), (b"1",), 0),
        (3, (-1,), (b"1",), 0),
        (3, (1, 2), (b"1",), 0),
        (3, (1,), (b"x" * 4097,), 0),
        (3, (1,) * 300, (b"x",) * 300, 0),
        (3, (1,) * 18, (b"x",) * 18, 0),
        (3, (1,), (b"1",), FINISH_LENGTH),
        (3, (1,), (b"1",), 9),
    ],
)
def test_nonsense_is_dropped_and_its_sender_named_and_avoided(index, tokens, pieces, finish) -> None:
    entry = streaming()
    effects = entry.tell(PiecesReceived("c", entry.session.id, index, tokens, pieces, finish))
    assert kinds(effects) == [Accuse, CancelSession, Ensure]
    assert entry.last(Accuse).peer == "c"
    assert entry.last(Ensure).without == ("c",)
    assert entry.emitted == [10, 11, 12]


def test_a_full_context_is_an_honest_reason_to_stop() -> None:
    entry = Entry()
    entry.ready("a", "b", "c", context=7)
    entry.pieces(0, 10, 11, 12, finish=FINISH_LENGTH)
    assert entry.last(Finish).reason == "length"


def test_frames_that_are_not_their_senders_to_send_change_nothing() -> None:
    entry = streaming()
    assert kinds(entry.pieces(3, 13, peer="a")) == [Accuse]
    assert kinds(entry.tell(SessionRefused("c", entry.session.id, "busy", ""))) == [Accuse]
    assert kinds(entry.pieces(3, 13, session=b"t" * 16)) == [Accuse]
    assert kinds(entry.tell(StageErred("z", entry.session.id, "internal", ""))) == [Accuse]
    assert entry.emitted == [10, 11, 12]
    assert entry.session.state == "streaming"


def test_tokens_after_the_finish_name_their_sender_once() -> None:
    entry = streaming()
    entry.pieces(3, finish=FINISH_EOG)
    assert kinds(entry.pieces(3, 13)) == [Accuse]
    assert kinds(entry.pieces(4, 14)) == []
    other = streaming()
    other.tell(StopFound())
    assert kinds(other.pieces(3, 13)) == []


def test_who_blames_a_neighbour_may_be_the_one_at_fault() -> None:
    """b blames a, then c: after two pipelines with b it is b that is avoided; a and c are not."""
    entry = streaming()
    entry.tell(StageErred("b", entry.session.id, "not_finite", "row 3", 0))
    assert entry.last(Ensure).without == ()
    entry.ready("d", "b", "c")
    entry.pieces(3, 13)
    entry.tell(StageErred("b", entry.session.id, "not_finite", "row 4", 0))
    assert entry.last(Ensure).without == ("b",)


def test_blaming_a_stage_that_does_not_exist_is_a_lie() -> None:
    entry = streaming()
    assert kinds(entry.tell(StageErred("b", entry.session.id, "internal", "", 3)))[0] is Accuse


def test_a_client_that_leaves_is_cancelled_at_once_wherever_it_stands() -> None:
    for entry in (streaming(), Entry()):
        effects = entry.tell(ClientLeft())
        assert kinds(effects) in ([CancelSession, Finish], [Finish])
        assert entry.last(Finish).reason == "cancelled"
        assert not entry.timers
        assert entry.tell(EnsureAnswered(1, Ready(pipeline("a")))) == []


def test_a_stop_string_ends_it_well() -> None:
    entry = streaming()
    assert kinds(entry.tell(StopFound())) == [CancelSession, Finish]
    assert entry.last(Finish) == Finish("stop", 3, 2)


def test_a_mesh_that_cannot_hold_the_model_says_by_how_much() -> None:
    entry = Entry()
    words = "needs 41.2 GB, the mesh has 37.0 GB free: 4.2 GB short"
    entry.tell(EnsureAnswered(1, Refused("no_memory", words, False, 4_200_000_000)))
    assert entry.last(Fail) == Fail("unavailable", words, True)


def test_before_it_gives_up_for_memory_it_forgives_who_is_no_liar() -> None:
    entry = streaming()
    entry.tell(PeerDown("b", ("x", "y")))
    entry.tell(EnsureAnswered(entry.last(Ensure).ask, Refused("no_memory", "1 GB short", False)))
    assert entry.last(Fail) is None
    entry.wait(1.0)
    assert entry.last(Ensure).without == ()
    lied = streaming()
    lied.pieces(3, 5000)
    lied.tell(EnsureAnswered(lied.last(Ensure).ask, Refused("no_memory", "1 GB short", False)))
    assert lied.last(Fail).words == "1 GB short (without c, which sent nonsense)"


def test_a_pipeline_with_a_liar_is_not_used() -> None:
    entry = streaming()
    entry.pieces(3, 5000)
    opened = entry.last(OpenSession)
    entry.ready("a", "b", "c", name=b"pipelin2")
    assert entry.last(OpenSession) == opened
    assert Ensure in kinds(entry.wait(1.0))


def test_loading_is_told_and_asked_for_again_but_not_in_circles() -> None:
    entry = Entry()
    for _ in range(10):
        entry.tell(EnsureAnswered(entry.last(Ensure).ask, Loading("3 of 12 layers", 0.25)))
        assert entry.last(Progressed) == Progressed("loading", "3 of 12 layers", 0.25)
        assert kinds(entry.wait(0.4)) == []
        assert kinds(entry.wait(0.2)) == [Ensure]
    limited = Entry(load_s=100.0)
    limited.now += 101.0
    limited.tell(EnsureAnswered(limited.last(Ensure).ask, Loading("still")))
    assert limited.last(Fail).code == "timeout"


def test_without_a_coordinator_it_waits_and_then_says_so() -> None:
    entry = Entry()
    while entry.session.state != "ended":
        assert entry.now < 1100.0
        entry.tell(EnsureFailed(entry.last(Ensure).ask, "none is known"))
        entry.wait(1.0)
    assert entry.last(Fail).code == "unavailable"
    assert entry.now - 1000.0 > 30.0


def test_a_coordinator_that_never_answers_is_not_waited_for_for_ever() -> None:
    entry = Entry()
    entry.wait(120.0)
    assert entry.last(Fail).code == "unavailable"


def test_answers_to_older_asks_are_ignored() -> None:
    entry = Entry()
    entry.tell(EnsureFailed(1, "lost"))
    entry.wait(1.0)
    assert entry.last(Ensure).ask > 1
    assert entry.tell(EnsureAnswered(1, Ready(pipeline("a")))) == []


def test_full_slots_are_waited_for_but_not_for_ever() -> None:
    entry = Entry()
    while entry.session.state != "ended":
        assert entry.now < 1100.0
        entry.ready("a", "b", "c")
        entry.tell(SessionRefused("a", entry.session.id, "busy", "8 of 8 slots"))
        entry.wait(6.0)
    assert entry.last(Fail).code == "overloaded"
    assert entry.now - 1000.0 > 60.0


@pytest.mark.parametrize(("code", "mine"), [("context_full", "too_large"), ("grammar_invalid", "bad_request")])
def test_what_trying_again_cannot_mend_fails_at_once(code: str, mine: str) -> None:
    entry = Entry()
    entry.ready("a", "b", "c")
    entry.tell(SessionRefused("a", entry.session.id, code, "12 tokens too many"))
    assert entry.last(Fail) == Fail(mine, "12 tokens too many", False)


def test_tries_without_a_token_are_few_and_further_and_further_apart() -> None:
    entry = Entry(tries_max=6)
    tries = []
    while entry.session.state != "ended":
        tries.append(entry.now)
        entry.ready("a", "b", "c")
        entry.tell(StageErred("b", entry.session.id, "internal", "crashed"))
        while entry.session.state == "ensuring" and kinds(entry.out)[-1:] != [Ensure]:
            entry.wait(0.05)
    assert len(tries) == 7
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses[0] == 0.0
    assert pauses[1:] == sorted(pauses[1:])
    assert pauses[-1] > 2.0
    assert entry.last(Fail).code == "unavailable"
    assert "crashed" in entry.last(Fail).words


def test_every_token_gives_new_tries() -> None:
    entry = Entry(max_tokens=30)
    for number in range(25):
        entry.ready("a", "b", "c")
        entry.pieces(number, number)
        entry.tell(StageErred("b", entry.session.id, "internal", "crashed"))
    assert entry.session.state == "ensuring"
    assert entry.emitted == list(range(25))


def test_the_number_of_tries_in_all_is_bounded() -> None:
    entry = Entry(max_tokens=30, attempts_max=5)
    for number in range(6):
        entry.ready("a", "b", "c")
        if entry.session.state == "ended":
            break
        entry.pieces(number, number)
        entry.tell(StageErred("b", entry.session.id, "internal", "crashed"))
    assert entry.last(Fail).code == "unavailable"
    assert entry.session.attempt == 5


def test_a_pipeline_that_is_no_chain_is_not_opened() -> None:
    entry = Entry()
    gap = Pipeline(b"pipeline", "model", 100, 4, (Span("a", 0, 1), Span("b", 2, 3)))
    entry.tell(EnsureAnswered(1, Ready(gap)))
    assert entry.last(OpenSession) is None
    assert Ensure in kinds(entry.wait(1.0))


def test_with_fewer_nodes_than_stages_were_wished_for_an_answer_goes_on_and_says_so() -> None:
    entry = streaming(stages_min=3)
    entry.tell(PeerDown("b", ()))
    for stages in (3, 2):
        ask = entry.last(Ensure)
        assert ask.stages_min == stages
        entry.tell(EnsureAnswered(ask.ask, Refused(FEW_NODES, "Too few are left.", True)))
        assert entry.last(Progressed) == Progressed("recovering", f"Too few are left. It goes on with {stages - 1}.")
    entry.ready("c", name=b"another-")
    entry.pieces(3, 13)
    assert entry.emitted == [10, 11, 12, 13]
    for code in (FEW_NODES, NO_ENGINE):
        wished = streaming(engine="rpc")
        wished.tell(PeerDown("b", ()))
        wished.tell(EnsureAnswered(wished.last(Ensure).ask, Refused(code, "It is not there.", True)))
        assert wished.last(Progressed).words == "It is not there. It goes on without the engine rpc."
        assert wished.last(Ensure).engine == ""
    not_begun = Entry(stages_min=3)
    not_begun.tell(EnsureAnswered(1, Refused(FEW_NODES, "Too few are there.", True)))
    assert not_begun.last(Fail) == Fail("unavailable", "Too few are there.", True)
