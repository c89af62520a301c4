"""Admissions of machines that never came: whose is withdrawn, and whose is not."""

from pathlib import Path

from meshnode.cluster.service.arrivals import Arrivals
from protocol.records.events import PutRecord
from protocol.trust import authority
from protocol.trust.statements import TRUST_COLLECTION, Admission, record_key, seal
from protocol.wire.crypto import SodiumSuite
from tests.cluster.parts import ROOT, House
from tests.support.hub import keys_of

WAIT_S = 4.0
INVITATION = b"\x01" * 10


async def admit(house: House, index: int) -> None:
    """A machine that redeemed an invitation and was not heard of since."""
    roster, at = house.hubs.hub(0).roster, int(house.hubs.wall * 1000)
    said = authority.admitting(
        roster, public_key=keys_of(index)[1], name=f"n{index}", role="member", by=house.id(0), invitation=INVITATION,
        wall_ms=at,
    )  # fmt: skip
    assert isinstance(said, Admission)
    await publish(house, said)


async def publish(house: House, said: Admission) -> None:
    sealed = seal(said, SodiumSuite(ROOT.seed, ROOT.mesh_id))
    await house[0].driver.submit_durably(PutRecord(TRUST_COLLECTION, record_key(said.node_id), sealed))


async def test_who_never_came_is_withdrawn_and_who_was_promoted_is_not(tmp_path: Path) -> None:
    """Only who answers is promoted, so it was there, even if its profile is held back and this admin is new."""
    house = House(tmp_path, 1)
    admin, hub = house[0], house.hubs.hub(0)
    looks = Arrivals(
        hub=hub, nodes=admin.nodes, trust=admin.trust, now=lambda: house.hubs.now, wait_s=WAIT_S, log=admin.log
    )
    await admit(house, 7)
    await admit(house, 8)
    promoted = authority.promoting(hub.roster, house.id(8), by=house.id(0), wall_ms=int(house.hubs.wall * 1000))
    assert isinstance(promoted, Admission)
    await publish(house, promoted)
    await looks.look()
    house.hubs.run(WAIT_S + 1.0)
    await looks.look()
    assert house.id(7) not in hub.roster
    assert hub.roster.role(house.id(8)) == "admin"
