"""Each checker objects to what it is for: a checker that cannot fail proves nothing."""

from collections.abc import Callable

import pytest

from protocol.election.events import CoordinatorChanged, QuorumChanged
from protocol.election.fence import FENCE_MACHINE
from protocol.membership.events import PeerDown, PeerUp
from protocol.trust.events import RosterChanged
from simulations.checkers.agreement import Agreement
from simulations.checkers.bounded import Bounded
from simulations.checkers.checker import Checker, Violation
from simulations.checkers.convergence import Convergence
from simulations.checkers.death_witnesses import DeathWitnesses
from simulations.checkers.eviction import EvictedStayOut
from simulations.checkers.obedience import Obedience
from simulations.checkers.quorate import Quorate
from simulations.checkers.rising import Rising
from simulations.checkers.terms import Terms
from simulations.checkers.untouched import Untouched
from simulations.computer import Computer
from simulations.faults import Fault, Faults
from simulations.views import Views
from simulations.world import World


def quiet_mesh(*checkers: Checker, nodes: int = 4) -> tuple[World, list[Computer], Views]:
    views = Views()
    world = World(3, checkers=(views, *checkers))
    computers = world.spawn(nodes, within_s=0.1)
    world.run(1.0)
    assert world.run_until(lambda: views.wrong == 0, 30.0) is not None
    return world, computers, views


def objects(checker: str, act: Callable[[], None]) -> None:
    with pytest.raises(Violation) as caught:
        act()
    assert caught.value.checker == checker


def up(computer: Computer, boot: int) -> PeerUp:
    return PeerUp(computer.node_id, boot, (computer.address,), 1, 1)


def test_a_death_without_witnesses() -> None:
    world, (one, two, three, four), _ = quiet_mesh(DeathWitnesses())
    objects("death-witnesses", lambda: world.tell_published(one, PeerDown(two.node_id, (one.node_id,))))
    # Enough of them, but they never accused anybody.
    verdict = PeerDown(two.node_id, (three.node_id, four.node_id))
    objects("death-witnesses", lambda: world.tell_published(one, verdict))
    private = PeerDown(two.node_id, (three.node_id,), private=True)
    objects("death-witnesses", lambda: world.tell_published(one, private))


def test_a_real_death_has_real_witnesses() -> None:
    world, computers, views = quiet_mesh(DeathWitnesses())
    computers[0].crash()
    world.run(15.0)
    assert views.wrong == 0
    assert len(views.verdicts) == 3


def test_a_nonce_used_twice_and_a_boot_that_goes_back() -> None:
    sent: list[tuple[Computer, bytes]] = []
    world, (one, two, *_), _ = quiet_mesh(Rising())
    world.network.tap(lambda source, target, address, data: sent.append((source, data)))
    world.run(2.0)
    source, data = sent[0]
    objects("rising", lambda: world.network.send(source, two.address, data))
    objects("rising", lambda: world.tell_published(one, up(two, 5)))


def test_a_view_of_a_former_life_is_wrong() -> None:
    world, (one, two, *_), views = quiet_mesh()
    boot = two.program.boot_epoch(two.machine)
    two.restart()
    assert views.wrong == 6, "its own view is empty, and three list it in its former life"
    assert world.run_until(lambda: views.wrong == 0, 5.0) is not None
    world.tell_published(one, up(two, boot))
    assert views.wrong == 1
    assert views.sees(one, two)
    assert views.mistakes() == "1 wrong entries: #0 has #1 up in a former life"
    world.tell_published(one, up(two, two.program.boot_epoch(two.machine)))
    assert views.wrong == 0


def test_views_that_stay_wrong() -> None:
    views = Views()
    convergence = Convergence(views)
    world = World(3, checkers=(views, convergence))
    computers = world.spawn(4)
    world.run(10.0)
    world.network.cut(computers[0])
    convergence.healed(world.now)
    objects("convergence", lambda: world.run(40.0))


def test_a_false_death_among_the_untouched_and_none_among_the_touched() -> None:
    world, (one, two, *_), _ = quiet_mesh()
    faults = Faults(world)
    world.watch(Untouched(faults))
    objects("untouched", lambda: world.tell_published(one, PeerDown(two.node_id, ())))
    faults.do(Fault(world.now, "lossy", (1,), 1.0, 0.1))
    world.tell_published(one, PeerDown(two.node_id, ()))


def test_queues_and_datagrams_that_outgrow_their_limits() -> None:
    world, (one, two, *_), _ = quiet_mesh(Bounded())
    objects("bounded", lambda: world.network.send(one, two.address, bytes(1201)))
    for number in range(2000):
        one._set_timer(("membership", "leak", number), one.now() + 1000.0)
    objects("bounded", lambda: world.run(2.0))


def test_a_world_that_runs_in_circles() -> None:
    world, _, _ = quiet_mesh(Bounded(), nodes=1)

    def again() -> None:
        world.after(1e-7, again)

    again()
    objects("bounded", lambda: world.run(2.0))


def test_an_evicted_node_that_comes_up() -> None:
    world, (one, two, *_), _ = quiet_mesh(EvictedStayOut())
    world.tell_published(one, RosterChanged(removed=(two.node_id,)))
    objects("eviction", lambda: world.tell_published(one, up(two, 10**9)))
    objects("eviction", lambda: world.tell_published(one, CoordinatorChanged(9, two.node_id, False)))


def test_two_quorate_coordinators(monkeypatch: pytest.MonkeyPatch) -> None:
    world, (one, two, *_), _ = quiet_mesh(Quorate())
    monkeypatch.setattr(type(one.program), "is_quorate", lambda self, computer: True)
    world.tell_published(one, QuorumChanged(True, 1, 1, 1, ""))
    objects("quorate", lambda: world.tell_published(two, CoordinatorChanged(9, two.node_id, True)))


def test_a_term_that_falls() -> None:
    world, (one, *_), _ = quiet_mesh(Terms())
    world.tell_published(one, CoordinatorChanged(90, one.node_id, True))
    objects("terms", lambda: world.tell_published(one, CoordinatorChanged(89, one.node_id, True)))


def test_an_executor_that_forgets_whom_it_obeyed() -> None:
    obedience = Obedience()
    world, computers, _ = quiet_mesh(obedience)
    world.run(20.0)
    assert obedience.commands > 0
    executor = computers[1]
    obedience._obey(executor, 50, computers[0].node_id)
    executor.disk.tables.pop(FENCE_MACHINE)
    executor.restart()
    objects("obedience", lambda: world.run(20.0))


def test_records_that_stay_different() -> None:
    agreement = Agreement(within_s=5.0)
    world, (one, two, *_), _ = quiet_mesh(agreement)
    world.network.cut(two)
    one.program.put(one, b"key", b"value")  # type: ignore[attr-defined]  # the mesh program has it
    world.run(1.0)
    agreement.healed(world.now)
    objects("agreement", lambda: world.run(10.0))


def test_violations_cross_process_borders() -> None:
    import pickle

    violation = pickle.loads(pickle.dumps(Violation("name", 1.5, "words")))
    assert (violation.checker, violation.at, str(violation)) == ("name", 1.5, "name at 1.500 s: words")
