"""The simulated models: quiet runs are perfect, faulty ones never wrong, and the toy engine shows every mix-up."""

import pytest

from simulations.bugs.hunt import hunt
from simulations.bugs.listing import bugs
from simulations.catalogue import scenarios
from simulations.scenarios.scenario import Options, Samples
from simulations.sharding.fabric import SHAPES
from simulations.sharding.toy import END, next_token, undisturbed


def measured(seed: int, pattern: str | None, duration_s: float) -> Samples:
    scenario = scenarios()["sharding"]
    options = Options(nodes=scenario.nodes, seed=seed, pattern=pattern, duration_s=duration_s)
    samples = scenario.measure(options)
    assert [figure.name for figure in scenario.judge(samples, options) if figure.met is False] == []
    return samples


def test_in_peace_everybody_is_served_by_one_load_of_each_model() -> None:
    samples = measured(1, "quiet", 20.0)
    assert samples.of("good") == samples.of("ended") == samples.of("clients")
    # Four stages: the large model on three nodes, the small one on one.
    assert sum(samples.of("loads")) <= 5


@pytest.mark.parametrize("seed", [3, 101])
def test_with_all_faults_at_once_no_answer_is_wrong(seed: int) -> None:
    samples = measured(seed, None, 40.0)
    assert sum(samples.of("clients")) > 20


def test_equal_seeds_give_equal_runs() -> None:
    one, other = (measured(5, "crash,lie", 15.0) for _ in range(2))
    assert one.trace == other.trace
    assert one.values == other.values


@pytest.mark.parametrize("name", ["nonsense-believed", "load-not-joined"])
def test_a_bug_in_sharding_that_is_put_back_is_found(name: str) -> None:
    found = hunt(next(bug for bug in bugs() if bug.name == name), within_s=60.0)
    assert found.by is not None


def test_the_toy_model_depends_on_every_token_and_on_their_order() -> None:
    prompt = (1, 2, 3)
    assert len({next_token(prompt), next_token((1, 2)), next_token((2, 1, 3)), next_token((1, 2, 3, 3))}) == 4
    tokens, reason = undisturbed(prompt, 50)
    assert reason in ("stop", "length")
    assert END not in tokens
    resumed, _ = undisturbed((*prompt, *tokens[:5]), 50 - 5)
    assert tokens[5:] == resumed[: len(tokens) - 5]


def test_the_large_toy_model_needs_several_computers() -> None:
    assert SHAPES["large"].total_bytes > 9_000_000_000 > SHAPES["small"].total_bytes
