"""Every scenario runs, in small; the command line prints what programs and people need; bugs put back are found."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from simulations.__main__ import main
from simulations.bugs.bug import Bug, Patches
from simulations.bugs.hunt import hunt
from simulations.bugs.listing import bugs
from simulations.catalogue import scenarios
from simulations.checkers.checker import Violation
from simulations.faults import SHAPES, Faults, Shape, draw
from simulations.report import as_table, replay
from simulations.runner import Failure, Outcome, run_seeds
from simulations.scenarios.scenario import Figure, Options, Samples, mesh, quantile
from simulations.seeds import FAILED_ONCE, Seed
from simulations.views import Views
from simulations.world import World

SMALL = {
    "membership": Options(nodes=8, seed=5, duration_s=24.0),
    "partition": Options(nodes=8, seed=5, duration_s=30.0),
    "loss": Options(nodes=8, seed=5, duration_s=20.0, pattern="5"),
    "degraded": Options(nodes=10, seed=5, duration_s=60.0),
    "join-storm": Options(nodes=8, seed=5),
    "resources": Options(nodes=8, seed=5, duration_s=30.0),
    "election": Options(nodes=5, seed=5),
    "records": Options(nodes=5, seed=5),
    "replay": Options(nodes=6, seed=5, duration_s=5.0),
    "rotation": Options(nodes=8, seed=5),
    "twins": Options(nodes=6, seed=5),
    "withdrawal": Options(nodes=6, seed=5),
    "sharding": Options(nodes=6, seed=5, duration_s=60.0),
    "tasks": Options(nodes=4, seed=5, duration_s=30.0),
    "churn": Options(nodes=5, seed=5, duration_s=60.0),
}


@pytest.mark.parametrize("name", list(scenarios()))
def test_every_scenario_meets_its_goals_in_small(name: str) -> None:
    scenario = scenarios()[name]
    samples = scenario.measure(SMALL[name])
    missed = {figure.name: figure.value for figure in scenario.judge(samples, SMALL[name]) if figure.met is False}
    assert not missed
    assert samples.events > 1000


@pytest.mark.parametrize("pattern", ["33/1", "8/0.26", "frozen"])
def test_the_hard_patterns_of_degradation(pattern: str) -> None:
    options = Options(nodes=20, seed=2, duration_s=100.0, pattern=pattern)
    samples = scenarios()["degraded"].measure(options)
    figures = {figure.name: figure.value for figure in scenarios()["degraded"].judge(samples, options)}
    assert figures["false_deaths_at_healthy_nodes"] == 0
    assert figures["verdicts_on_degraded_nodes"]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_every_kind_of_fault_is_undone(shape: Shape) -> None:
    kind = shape.kind
    world = World(4, checkers=(views := Views(),))
    world.spawn(5)
    world.run(10.0)
    faults = Faults(world)
    plan = draw(Random(4), 5, world.now, world.now + 30.0, per_minute=20.0, kinds=kind)
    assert plan
    assert {fault.kind for fault in plan} == {kind}
    faults.schedule(plan)
    world.run(31.0)
    assert world.run_until(lambda: views.wrong == 0, 60.0) is not None
    for computer in world.computers:
        assert (computer.cut_in, computer.cut_out, computer.loss, computer.service_s) == (0, 0, 0.0, 0.0)
        assert (computer.disk.full, computer.disk.slowness, computer.paused) == (False, 1.0, False)
        assert abs(computer.wall_error()) < 5.0
    assert world.network.open(world.computers[0], world.computers[1])
    assert world.network.params.loss == 0.0


@pytest.mark.parametrize("seed", FAILED_ONCE, ids=lambda seed: f"{seed.scenario}-{seed.seed}")
def test_a_seed_that_failed_once_never_fails_again(seed: Seed) -> None:
    scenario = scenarios()[seed.scenario]
    options = Options(nodes=scenario.nodes, seed=seed.seed)
    samples = scenario.measure(options)
    assert not [figure.name for figure in scenario.judge(samples, options) if figure.met is False]


def test_json_has_every_figure_with_its_goal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["partition", "--nodes", "6", "--duration", "20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    figure = told["figures"]["full_views_after_heal"]
    assert figure["goal"] == 5.0
    assert figure["met"] is True
    assert told["met"] is True
    assert told["failures"] == []
    assert told["commit"]


def test_seeds_in_parallel_measure_what_they_measure_alone() -> None:
    options = Options(nodes=4, seed=1, duration_s=20.0)
    alone, together = (run_seeds("churn", options, 3, jobs) for jobs in (1, 2))
    assert alone.samples.trace == together.samples.trace
    assert alone.seeds == together.seeds == 3
    assert not alone.failures


def test_a_failing_seed_says_how_to_replay_it() -> None:
    options = Options(nodes=4, seed=1, pattern="crash")
    outcome = Outcome(failures=[Failure(17, "views at 3 s: wrong")], seeds=20)
    table = as_table("churn", options, outcome, ())
    assert "seed 17" in table
    assert "scripts/sim churn --nodes 4 --seed 17 --pattern crash" in table
    assert replay("churn", replace(options, duration_s=5.0), 2).endswith("--seed 2 --duration 5 --pattern crash")


def test_quantiles_and_goals() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([float(value) for value in range(1, 101)], 0.99) == 99.0
    assert Figure("x", None, "s", 1.0).met is False
    assert Figure("x", 2.0, "s", 1.0, at_least=True).met is True
    assert Figure("x", 2.0, "s").met is None


def test_merged_samples_hold_everything() -> None:
    one, other = Samples({"a": [1.0]}, events=1), Samples({"a": [2.0], "b": [3.0]}, events=2)
    one.merge(other)
    assert one.values == {"a": [1.0, 2.0], "b": [3.0]}
    assert one.events == 3


def test_the_list_of_bugs_is_long_enough_and_every_patch_fits_the_code() -> None:
    listed = bugs()
    assert len(listed) >= 20
    assert len({bug.name for bug in listed}) == len(listed)
    for bug in listed:
        assert bug.scenario in scenarios()
        with bug.injected():
            pass


@pytest.mark.parametrize(
    "name", ["one-witness", "window-forgets", "dead-stay-in-the-list", "half-is-enough", "fence-forgets"]
)
def test_a_bug_that_is_put_back_is_found(name: str) -> None:
    found = hunt(next(bug for bug in bugs() if bug.name == name), within_s=60.0)
    assert found.by is not None


def test_what_objects_without_the_bug_as_well_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(self: object, options: Options) -> Samples:
        raise Violation("always", 0.0, "wrong with and without")

    monkeypatch.setattr(type(scenarios()["churn"]), "measure", always)
    harmless = Bug("harmless", "changes nothing", lambda patches: None)
    assert hunt(harmless, within_s=0.01).by is None


def test_patches_are_undone_and_refuse_what_is_not_there() -> None:
    class Victim:
        value = 1

    patches = Patches()
    patches.set(Victim, "value", 2)
    assert Victim.value == 2
    patches.undo()
    assert Victim.value == 1
    with pytest.raises(AttributeError):
        patches.set(Victim, "gone", 3)


def test_the_script_prints_help_for_people() -> None:
    script = Path(__file__).resolve().parent.parent.parent / "scripts" / "sim"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0
    for name in (*scenarios(), "ci", "bugs"):
        assert name in done.stdout


def test_an_evicted_node_knows_it_within_seconds_though_nobody_sends_it_a_record() -> None:
    """Its datagrams are dropped, so it tries a link; the refusal shows it the root's word."""
    made = mesh(Options(nodes=6, seed=3), own_rosters=True)
    world, program = made.world, made.program
    computers = world.spawn(6)
    victim = computers[5]
    world.run(8.0)
    assert len(program.believed_up(victim)) == 5
    program.evict(victim, computers[0])
    world.run(5.0)
    assert not program.knows(victim, victim.node_id)
    assert list(program.believed_up(victim)) == []
    assert all(len(program.believed_up(computer)) == 4 for computer in computers[:5])
