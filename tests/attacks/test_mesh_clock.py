"""Case 18: a wall clock that jumps by ten minutes or to 2040, at one machine or at the coordinator that is cut off.

Leases run on a clock of their own, deaths on the monotonic one, membership on the roster: nothing here asks a calendar.
Certificates are in test_links_clock, records that claim to be from the future in tests/protocol/records/test_clock.
"""

from pathlib import Path
from typing import Final

import pytest

from meshnode.kernel.database.keyvalue import KeyValue, kernel_migrations
from meshnode.kernel.database.store import open_database
from meshnode.node import founding
from protocol.election.tally import LeaseClock
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerSuspected
from protocol.wire import limits
from tests.protocol.wire.hubs import WALL, Host, Hubs, settled

TEN_MINUTES: Final = 600.0
YEAR_2040: Final = 2_208_988_800.0
JUMPS: Final = {"back": -TEN_MINUTES, "ahead": TEN_MINUTES, "2040": YEAR_2040 - WALL, "1970": -WALL}
LABELS: Final = ("a", "b", "c", "d", "e")


def quorate(mesh: Hubs) -> list[str]:
    """Who believes now that it is the one coordinator of the mesh."""
    return [
        host.label
        for host in mesh.hosts.values()
        if host.hub is not None and host.hub.election.is_quorate(mesh.now, mesh.wall(host))
    ]


def leader_of(host: Host) -> NodeId | None:
    """Whom it follows."""
    return host.live.election.coordinator


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("at_leader", [True, False])
def test_case_18_a_jump_changes_neither_views_nor_coordinator(jump: str, at_leader: bool) -> None:
    mesh = settled(*LABELS)
    leader = leader_of(mesh["a"])
    assert leader is not None
    host = next(host for host in mesh.hosts.values() if (host.node_id == leader) is at_leader)
    everybody = host.up()
    host.wall_offset = JUMPS[jump]
    for _ in range(300):
        mesh.run(0.1)
        assert len(quorate(mesh)) <= 1
    for other in mesh.hosts.values():
        assert other.up() == everybody
        assert leader_of(other) == leader
        assert not [e for e in other.published if isinstance(e, PeerDown | PeerSuspected)]
    assert len(quorate(mesh)) == 1


def most_quorate_at_once(mesh: Hubs, jump: float) -> int:
    """The coordinator is cut off and its clock jumps at that moment; the others go on and choose another."""
    leader = mesh.find(leader_of(mesh["a"]) or NodeId(""))
    assert leader is not None
    assert quorate(mesh) == [leader.label]
    mesh.cut = lambda source, target: leader in (source, target)
    leader.wall_offset = jump
    most = 0
    for _ in range(400):
        mesh.run(0.05)
        most = max(most, len(quorate(mesh)))
    assert quorate(mesh) != [leader.label]
    return most


@pytest.mark.parametrize("jump", JUMPS)
def test_case_18_no_jump_makes_a_lease_outlive_its_promise(jump: str) -> None:
    mesh = settled(*LABELS)
    assert most_quorate_at_once(mesh, JUMPS[jump]) == 1
    assert len(quorate(mesh)) == 1


def test_case_18_with_leases_by_the_wall_clock_two_are_quorate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LeaseClock, "peek", lambda self, now, wall: self._time + (wall - self._wall))
    assert most_quorate_at_once(settled(*LABELS), -TEN_MINUTES) == 2


@pytest.mark.parametrize("defended", [True, False])
async def test_case_18_a_start_in_2040_does_not_use_the_identity_up(
    defended: bool, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boots go on from the highest ever used, so peers that saw the one of 2040 hear this node afterwards as well.

    Taken away: that the stored epoch counts, as if the clock alone made it.
    """
    if not defended:
        monkeypatch.setattr(KeyValue, "load_all", lambda self, machine: {})
    boots = []
    for wall in (WALL, YEAR_2040, WALL + 60.0, WALL + 120.0):
        monkeypatch.setattr("time.time", lambda wall=wall: wall)
        async with open_database(data_dir / "boot.db", kernel_migrations(), wall=wall, inline=True) as database:
            boots.append(await founding.next_boot(KeyValue(database)))
    assert boots[1] <= limits.BOOT_MAX
    mesh = settled("a", "b")
    heard = []
    for boot in boots:
        mesh.stop("a")
        mesh.run(8.0)
        mesh["a"].boot = boot - 1
        mesh.start("a")
        mesh.run(4.0)
        heard.append(mesh["b"].live.membership.view.rank(mesh["a"].node_id)[0] == boot)
    assert heard == ([True] * 4 if defended else [True, True, False, False])
