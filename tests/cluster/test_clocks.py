"""What a person is told when members' clocks disagree."""

from meshnode.cluster.service.clocks import Clocks
from protocol.ids import NodeId

A, B, C, D = (NodeId(letter * 32) for letter in "abcd")
DAY_S = 86_400.0


def name_of(node: NodeId) -> str:
    return node[0].upper()


def test_nobody_is_accused_of_nothing() -> None:
    assert Clocks().warning(name_of) is None


def test_one_member_ahead_is_named_and_either_clock_may_be_wrong() -> None:
    clocks = Clocks()
    clocks.held(A, 365 * DAY_S)
    said = clocks.warning(name_of)
    assert said is not None
    assert "the clock of A is 365 days ahead" in said
    assert "timedatectl" in said


def test_where_several_are_ahead_it_is_this_clock_that_is_behind() -> None:
    clocks = Clocks()
    for member, ahead_s in ((A, 7_300.0), (B, 7_200.0), (C, 7_400.0), (D, 7_500.0)):
        clocks.held(member, ahead_s)
    said = clocks.warning(name_of)
    assert said is not None
    assert "this machine's clock is 2 hours behind the clocks of A, B, C and 1 more" in said


def test_the_warning_ends_when_a_record_counts_again() -> None:
    clocks = Clocks()
    clocks.held(A, 400.0)
    assert "7 minutes" in str(clocks.warning(name_of))
    assert clocks.agreed(A)
    assert not clocks.agreed(A)
    assert clocks.warning(name_of) is None
