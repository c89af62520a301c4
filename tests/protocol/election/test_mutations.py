"""The proof that the histories can see: every bug of mutations.py is found by them."""

import pytest

from tests.protocol.election.histories import run_history
from tests.protocol.election.mutations import MUTATIONS, Mutation
from tests.protocol.election.world import InvariantError

SEARCHED = 120


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_put_back_is_found(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the seed that found it first, or, when a change of the code has shifted the histories, by one of many."""
    with monkeypatch.context() as patch:
        mutation.apply(patch)
        for seed in (*mutation.seeds, *range(SEARCHED)):
            try:
                run_history(seed)
            except (InvariantError, ValueError) as error:
                if seed not in mutation.seeds or mutation.shows in str(error):
                    found = seed
                    break
        else:
            pytest.fail(f"{mutation.name} was not found in {SEARCHED} histories")
    run_history(found)  # without the bug the same history passes
