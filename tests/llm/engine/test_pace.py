"""How long a pass may take: known from those before, however slow the machine is."""

import pytest

from meshnode.llm.engine.pace import Pace
from meshnode.llm.engine.process import Patience


def test_what_was_never_seen_is_unknown() -> None:
    assert Pace().expected_s(1) == Pace().expected_s(256) == 0.0
    assert Patience().deadline_s(0.0) == Patience().unknown_s


def test_prompts_and_single_rows_are_learnt_apart() -> None:
    pace = Pace()
    pace.took(1, 0.05)
    assert pace.expected_s(1) == pytest.approx(0.05)
    assert pace.expected_s(256) == pytest.approx(256 * 0.05), "the best guess until a prompt was seen"
    pace.took(64, 0.64)
    assert pace.expected_s(256) == pytest.approx(2.56)
    assert pace.expected_s(4) == pytest.approx(0.2)


def test_slow_passes_count_at_once_and_quick_ones_slowly() -> None:
    pace = Pace()
    pace.took(1, 0.1)
    pace.took(1, 1.0)
    assert pace.expected_s(1) == 1.0
    pace.took(1, 0.1)
    assert pace.expected_s(1) == pytest.approx(0.82)


def test_a_slow_machine_has_time_and_a_quick_one_is_found_hung_in_seconds() -> None:
    patience = Patience()
    assert patience.deadline_s(0.05) == patience.least_s < 5.0
    assert patience.deadline_s(30.0) == 300.0
