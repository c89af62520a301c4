"""The list of re-injectable bugs, by the part of the protocol that they are put into."""

from simulations.bugs.bug import Bug
from simulations.bugs.election import election_bugs
from simulations.bugs.membership import membership_bugs
from simulations.bugs.records import records_bugs
from simulations.bugs.sharding import sharding_bugs
from simulations.bugs.tasks import task_bugs
from simulations.bugs.trust import trust_bugs
from simulations.bugs.wire import wire_bugs


def bugs() -> tuple[Bug, ...]:
    """All of them; names are unique."""
    return (
        *membership_bugs(),
        *wire_bugs(),
        *trust_bugs(),
        *election_bugs(),
        *records_bugs(),
        *sharding_bugs(),
        *task_bugs(),
    )
