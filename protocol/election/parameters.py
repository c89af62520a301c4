"""The numbers of the election. Seconds unless the name says else."""

from dataclasses import dataclass

from protocol.election.messages import LEASE_MS_MAX


@dataclass(frozen=True, slots=True)
class ElectionParameters:
    """Leases, delays and bounds.

    `drift_max` bounds how much faster or slower than real time a clock may run, both ends of a lease together: with
    5 % two clocks may each be wrong by 2.5 %, a thousand times what quartz does.
    """

    lease_s: float = 7.5
    drift_max: float = 0.05
    beats_per_lease: int = 3
    beacons_per_s_max: float = 300.0  # the lease stretches so that regular beacons stay under it
    slice_nodes: int = 64  # so many beacons at once at most; a larger mesh gets its beat in slices
    grace_s: float = 2.0  # after a start: time for membership to find the others and for a beacon to come
    grace_incumbent_s: float = 1.0  # the same for the node that coordinated before it restarted
    second_best_s: float = 0.6  # the second-best candidate gives the best so long to claim ...
    stagger_s: float = 0.2  # ... and each further one so much more
    climb_s: float = 0.2  # a quorate coordinator that hears of a higher term gathers others for so long
    contest_s: float = 2.0  # a coordinator refused for the sake of a node that it takes for dead waits so long
    retry_s: float = 0.25  # first repetition of an unanswered push; doubles up to the beat's period
    ask_s: float = 0.3  # pause between two requests for an electorate
    pushes_per_s_max: float = 1000.0  # bounds how fast the electorate absorbs joins
    revert_s: float = 3.0  # a change that a majority does not take up in this time is taken back
    late_s: float = 1.0  # a timer so late says that this process did not run
    term_leap_max: int = 2**20  # a term further ahead than this is an attempt to use the counter up

    def lease_for(self, members: int) -> float:
        """Lease in seconds in a mesh of so many members."""
        stretched = self.beats_per_lease * members / self.beacons_per_s_max
        return min(max(self.lease_s, stretched), LEASE_MS_MAX / 1000)
