"""All scenarios by name."""

from collections.abc import Mapping

from simulations.scenarios.churn import Churn
from simulations.scenarios.degraded import Degraded
from simulations.scenarios.election import Election
from simulations.scenarios.join_storm import JoinStorm
from simulations.scenarios.loss import Loss
from simulations.scenarios.membership import Membership
from simulations.scenarios.partition import Partition
from simulations.scenarios.records import Records
from simulations.scenarios.replay import Replay
from simulations.scenarios.resources import Resources
from simulations.scenarios.rotation import Rotation
from simulations.scenarios.scenario import Scenario
from simulations.scenarios.sharding import Sharding
from simulations.scenarios.tasks import Tasks
from simulations.scenarios.twins import Twins
from simulations.scenarios.withdrawal import Withdrawal


def scenarios() -> Mapping[str, Scenario]:
    """In the order in which help lists them."""
    known: tuple[Scenario, ...] = (
        Membership(),
        Partition(),
        Loss(),
        Degraded(),
        JoinStorm(),
        Resources(),
        Election(),
        Records(),
        Replay(),
        Rotation(),
        Twins(),
        Withdrawal(),
        Sharding(),
        Tasks(),
        Churn(),
    )
    return {scenario.name: scenario for scenario in known}
