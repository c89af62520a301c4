"""Views that differ come together: comparisons over links and their pace, reports by witnesses, the falsely dead."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.membership import healing
from protocol.membership.events import PeerDown, PeerUp, RosterShrank
from protocol.membership.healing import REPORT_LAG_S, TELL_PAUSE_S
from protocol.membership.parameters import LAN
from protocol.wire import limits
from protocol.wire.messages import Accusation, Alive, Gossip, Ping, ViewOffer, ViewReply, ViewReport
from tests.protocol.membership.parts import STEADY, Subject
from tests.support.hub import Mesh, admitted, events, evicted, links, roster_of, sends

OTHER = b"\x01" * 8


def grown_up(size: int, **changes: float) -> Subject:
    """A node that knows all others and did not just start."""
    subject = Subject(size, params=replace(STEADY, **changes))  # type: ignore[arg-type]  # floats and ints alike
    subject.know(*range(1, size))
    subject.now += LAN.young_s + 1
    return subject


def kill(subject: Subject, *targets: int, by: tuple[int, ...] = (1, 2, 3)) -> None:
    subject.hear(*by)
    for target in targets:
        for accuser in by:
            subject.told(subject.mesh.accusation(accuser, target))
    subject.now += LAN.suspicion_floor_s
    for target in targets:
        subject.fire("suspect", subject.mesh.id(target))
    assert subject.down() >= set(targets)


# ---- comparisons ----------------------------------------------------------------------------------------------------


def test_a_difference_must_last_before_a_link_repairs_it() -> None:
    subject = grown_up(4)
    assert links(subject.packet(1, Ping(1, OTHER)), ViewOffer) == []
    subject.now += LAN.sync_wait_s - 0.1
    assert links(subject.packet(1, Ping(2, OTHER)), ViewOffer) == []
    subject.now += 0.2
    asked = links(subject.packet(1, Ping(3, OTHER)), ViewOffer)
    assert [to for to, _ in asked] == [subject.mesh.id(1)]
    assert asked[0][1] == ViewOffer(subject.mesh.roster.digest, subject.machine.view.entries())
    assert links(subject.packet(2, Ping(4, OTHER)), ViewOffer) == [], "a pause between two repairs"
    subject.now += 2 * LAN.sync_pause_s + 0.1
    assert links(subject.packet(2, Ping(5, OTHER)), ViewOffer) != []


def test_equal_views_make_the_wait_begin_anew() -> None:
    subject = grown_up(4)
    subject.packet(1, Ping(1, OTHER))
    subject.now += LAN.sync_wait_s
    subject.packet(2, Ping(2, subject.digest))
    assert links(subject.packet(1, Ping(3, OTHER)), ViewOffer) == []


def test_a_view_in_motion_is_left_to_gossip() -> None:
    subject = grown_up(5)
    subject.packet(1, Ping(1, OTHER))
    subject.now += LAN.sync_wait_s + 1
    subject.told(subject.mesh.alive(4, incarnation=1))
    assert links(subject.packet(1, Ping(2, OTHER)), ViewOffer) == []


def test_a_young_node_repairs_sooner() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    subject.packet(1, Ping(1, OTHER))
    subject.now += LAN.sync_wait_young_s + 0.01
    assert links(subject.packet(1, Ping(2, OTHER)), ViewOffer) != []


def exchange(a: Subject, b: Subject, size: int) -> None:
    """Two machines with views of their own repair over a link, which the test plays."""
    pending = [(a, b, links(_offer(a), ViewOffer)[0][1])]
    for _ in range(10):
        if not pending:
            return
        giver, taker, message = pending.pop(0)
        for _, answer in [*links(taker.linked(1, message), ViewReply), *links([], ViewOffer)]:
            pending.append((taker, giver, answer))  # type: ignore[arg-type]  # an answer to an offer is a reply
    raise AssertionError("the two never came to rest")


def _offer(subject: Subject) -> list:  # type: ignore[type-arg]  # effects of any kind
    subject.machine._begin(subject.now)
    subject.machine._healing.offer(subject.mesh.id(1))
    return subject._keep(subject.machine._end())


@given(
    st.dictionaries(st.integers(1, 9), st.integers(0, 3), max_size=9),
    st.dictionaries(st.integers(1, 9), st.integers(0, 3), max_size=9),
)
def test_one_comparison_makes_two_views_equal(mine: dict[int, int], theirs: dict[int, int]) -> None:
    size = 10
    a, b = Subject(size), Subject(size)
    for subject, known in ((a, mine), (b, theirs)):
        for index, incarnation in known.items():
            subject.told(subject.mesh.alive(index, incarnation=incarnation))
    exchange(a, b, size)
    assert a.digest == b.digest
    for index in range(1, size):
        newest = max(mine.get(index, -1), theirs.get(index, -1))
        assert (index in a.up()) is (newest >= 0)
        if newest >= 0:
            assert a.machine.view.rank(a.mesh.id(index))[1] == newest


def test_different_rosters_compare_too() -> None:
    """One of the two has not yet heard of an admission: positions mean nothing, statements still do."""
    subject = Subject(4)
    subject.know(1, 2, 3)
    effects = subject.linked(1, ViewOffer(OTHER, b"\xff" * 12))
    reply = links(effects, ViewReply)[0][1]
    signers = {stated.signer for stated in map(subject.mesh.codec(1).open, reply.statements) if stated is not None}
    assert signers == {subject.mesh.id(n) for n in range(4)}
    assert reply.wanted == []


def test_the_dead_and_the_gone_are_answered_with_the_proof() -> None:
    subject = grown_up(8)
    kill(subject, 7)
    subject.told(subject.mesh.leaving(6))
    everybody = Subject(8)
    everybody.know(*range(1, 8))
    reply = links(subject.linked(1, ViewOffer(subject.mesh.roster.digest, everybody.machine.view.entries())), ViewReply)
    opened = [subject.mesh.codec(1).open(blob) for blob in reply[0][1].statements]
    kinds = [type(stated.body).__name__ for stated in opened if stated is not None]
    assert sorted(kinds) == ["Accusation", "Accusation", "Accusation", "Leaving"]
    # What the other knows more of is asked for; it may have newer word.
    assert set(reply[0][1].wanted) == {subject.mesh.short(7), subject.mesh.short(6)}


def test_what_is_wanted_is_sent_once_and_only_of_members() -> None:
    subject = grown_up(6)
    kill(subject, 5)
    shorts = [subject.mesh.short(1), subject.mesh.short(5), b"\xee" * 8]
    reply = links(subject.linked(2, ViewReply([], shorts)), ViewReply)[0][1]
    bodies = [type(stated.body) for stated in map(subject.mesh.codec(1).open, reply.statements) if stated is not None]
    assert bodies == [Alive, Accusation, Accusation, Accusation]
    assert reply.wanted == []
    assert links(subject.linked(2, ViewReply([], [b"\xee" * 8])), ViewReply) == []


# ---- telling the falsely dead --------------------------------------------------------------------------------------


def test_a_dead_member_that_speaks_is_told_why_at_most_once_a_moment() -> None:
    subject = grown_up(8)
    kill(subject, 7)
    told = sends(subject.packet(7), Gossip)
    assert [to for to, _, _ in told] == [subject.mesh.id(7)]
    bodies = [stated.body for stated in map(subject.mesh.codec(7).open, told[0][1].items) if stated is not None]
    assert all(isinstance(body, Accusation) for body in bodies)
    assert len(bodies) == 3
    assert sends(subject.packet(7), Gossip) == []
    subject.now += TELL_PAUSE_S
    assert sends(subject.packet(7), Gossip) != []
    assert subject.down() == {7}, "its datagram alone is no refutation"


def test_a_member_never_heard_of_is_asked_over_the_link() -> None:
    subject = Subject(4)
    subject.know(1, 2)
    assert [to for to, _ in links(subject.packet(3), ViewOffer)] == [subject.mesh.id(3)]


def test_one_that_left_is_left_alone() -> None:
    subject = grown_up(4)
    subject.told(subject.mesh.leaving(3))
    assert subject.packet(3) == []


def test_proof_that_others_made_long_still_fits_a_datagram() -> None:
    """A later version may add fields to an accusation, and a hostile member may: the telling must fit all the same."""
    subject = grown_up(8)
    subject.hear(1, 2, 3)
    for by in (1, 2, 3):
        plain = subject.mesh.accusation(by, 7)
        long = subject.mesh.padded(by, plain.blob[: -limits.SIGNATURE_BYTES], 1000)
        stated = subject.mesh.codec(0).open(long)
        assert stated is not None, "unknown trailing fields are ignored"
        subject.told(stated, via=by)
    subject.now += LAN.suspicion_floor_s
    subject.fire("suspect", subject.mesh.id(7))
    assert subject.down() == {7}
    for _, gossip, _ in sends(subject.packet(7), Gossip):
        assert sum(len(blob) + 3 for blob in gossip.items) < limits.DATAGRAM_BODY_BYTES_MAX - 16


# ---- view reports --------------------------------------------------------------------------------------------------

SIZE = 24
LOST = range(16, 24)


def parted() -> Subject:
    """A node whose half of the mesh took the other for dead."""
    subject = grown_up(SIZE)
    kill(subject, *LOST)
    subject.now += REPORT_LAG_S
    return subject


@pytest.mark.parametrize("witnesses", [1, 2, 3, 4])
def test_so_many_distinct_witnesses_bring_back_a_whole_side(witnesses: int) -> None:
    subject = parted()
    effects = []
    for by in list(LOST)[:witnesses]:
        effects += subject.told(subject.mesh.report(by, range(SIZE)), via=by)
    back = {subject.mesh.number(up.peer) for up in events(effects, PeerUp)}
    assert back == (set(LOST) if witnesses >= LAN.witnesses_max else set())
    assert subject.down() == set(LOST) - back


def test_reports_that_were_under_way_at_a_death_do_not_undo_it() -> None:
    """While many come and go there are always some, and whoever is revived by mistake would be looked for by nobody."""
    subject = parted()
    kill(subject, 15)
    subject.now += REPORT_LAG_S - 0.1
    for by in (10, 11, 12, 13):
        subject.told(subject.mesh.report(by, range(16)), via=by)
    assert 15 in subject.down()
    subject.now += 0.2
    for by in (10, 11, 12):
        subject.told(subject.mesh.report(by, range(16), number=9), via=by)
    assert 15 not in subject.down(), "they had time to know it, and know better"


def test_one_witness_many_times_is_one_witness() -> None:
    subject = parted()
    for number in range(1, 9):
        subject.told(subject.mesh.report(16, range(SIZE), number=number), via=16)
    assert subject.down() == set(LOST)


def test_only_those_that_all_of_them_name_come_back() -> None:
    subject = parted()
    for by, named in ((16, range(SIZE)), (17, range(20)), (18, range(18))):
        subject.told(subject.mesh.report(by, named), via=by)
    assert subject.down() == set(range(18, 24))


def test_old_numbers_other_rosters_and_stale_reports_do_not_count() -> None:
    subject = parted()
    subject.told(subject.mesh.report(16, [16], number=5), via=16)
    subject.told(subject.mesh.report(16, range(SIZE), number=4), via=16)
    subject.told(subject.mesh.report(17, range(SIZE), digest=OTHER), via=17)
    subject.told(subject.mesh.report(18, range(SIZE)), via=18)
    subject.now += LAN.report_fresh_s + 0.1
    subject.told(subject.mesh.report(19, range(SIZE)), via=19)
    subject.told(subject.mesh.report(20, range(SIZE)), via=20)
    assert subject.down() == set(LOST)
    subject.told(subject.mesh.report(21, range(SIZE)), via=21)
    assert subject.down() == set()


def test_many_lost_are_told_by_one_report_instead_of_proof() -> None:
    subject = parted()
    told = sends(subject.packet(20), Gossip)
    assert len(told) == 1
    stated = subject.mesh.codec(20).open(told[0][1].items[0])
    assert stated is not None
    body = stated.body
    assert isinstance(body, ViewReport)
    up = {
        n
        for n in range(SIZE)
        if int.from_bytes(body.up, "little") >> (subject.mesh.roster.index(subject.mesh.id(n)) or 0) & 1
    }
    assert up == subject.up()
    # The same view within moments is the same report: it is signed once.
    again = sends(subject.packet(21), Gossip)
    assert again[0][1].items == told[0][1].items


def test_a_newcomer_makes_no_report_of_a_view_that_it_copied() -> None:
    subject = Subject(SIZE, params=replace(STEADY, report_age_s=LAN.report_age_s))
    began = subject.now
    subject.know(*range(1, SIZE))
    kill(subject, *LOST)
    assert subject.now < began + LAN.report_age_s
    for later, kind in ((0.0, Accusation), (LAN.report_age_s, ViewReport)):
        subject.now += later
        ((_, told, _),) = sends(subject.packet(20), Gossip)
        opened = [subject.mesh.codec(20).open(blob) for blob in told.items]
        assert {type(stated.body) for stated in opened if stated is not None} == {kind}


def test_who_is_reported_gone_refutes_at_once_if_alone_and_waits_if_many_are() -> None:
    alone = grown_up(SIZE)
    before = alone.machine._s.incarnation
    alone.told(alone.mesh.report(1, range(1, SIZE)), via=1)
    assert alone.machine._s.incarnation == before + 1
    many = grown_up(SIZE)
    many.told(many.mesh.report(1, range(10, SIZE)), via=1)
    assert many.machine._s.incarnation == before, "reports bring back all of them for less"
    many.now += LAN.heal_wait_s + 0.1
    many.told(many.mesh.report(2, range(10, SIZE)), via=2)
    assert many.machine._s.incarnation == before + 1


def test_a_newcomer_that_many_reports_miss_says_once_and_at_once_that_it_lives() -> None:
    """Reports would bring back the life it had before, and datagrams to that one reach nobody."""
    subject = grown_up(SIZE, report_age_s=20.0)
    for by in (1, 2, 3):
        subject.told(subject.mesh.report(by, range(10, SIZE)), via=by)
        assert subject.machine._s.incarnation == 1
    old = grown_up(SIZE, report_age_s=5.0)
    old.told(old.mesh.report(1, range(10, SIZE)), via=1)
    assert old.machine._s.incarnation == 0


def test_bits_beyond_the_roster_move_nothing() -> None:
    subject = parted()
    report = subject.mesh.report(16, range(SIZE)).body
    assert isinstance(report, ViewReport)
    for by in (16, 17, 18):
        wide = ViewReport(subject.mesh.short(by), 100, 1, subject.mesh.roster.digest, b"\xff" * 600)
        subject.told(subject.mesh.sign(by, wide), via=by)
    assert subject.down() == set()
    assert subject.up() == set(range(SIZE))


def test_a_report_of_the_evicted_counts_for_nothing() -> None:
    subject = parted()
    for by in (16, 17):
        subject.told(subject.mesh.report(by, range(SIZE)), via=by)
    subject.mesh.roster.apply(evicted(16))
    subject.give(RosterShrank((subject.mesh.id(16),)))
    subject.told(subject.mesh.report(18, range(17, SIZE)), via=18)
    assert subject.down() == set(LOST) - {16}


def test_where_a_report_would_not_fit_a_statement_the_proof_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    overhead = len(Mesh(4).report(1, [0]).blob) - 1
    assert overhead + healing.REPORT_ROSTER_MAX // 8 + 16 <= limits.STATEMENT_BYTES_MAX
    subject = parted()
    monkeypatch.setattr(healing, "REPORT_ROSTER_MAX", SIZE - 1)
    bodies = [
        type(stated.body)
        for _, gossip, _ in sends(subject.packet(20), Gossip)
        for stated in map(subject.mesh.codec(20).open, gossip.items)
        if stated is not None
    ]
    assert bodies == [Accusation] * 3
    effects = subject.told(subject.mesh.report(21, [21]), via=21)
    assert sends(effects, Gossip) == [], "nor is it told back"


def test_private_verdicts_end_with_the_first_word() -> None:
    subject = grown_up(5)
    effects = subject.run(LAN.isolation_s + 1)
    assert all(event.private for event in events(effects, PeerDown))
    for by in (1, 2, 3, 4):
        subject.packet(by)
    assert subject.up() == {0, 1, 2, 3, 4}
    assert roster_of(range(2)).statement(subject.mesh.id(1)) == admitted(1)
