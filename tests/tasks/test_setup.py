"""What setup adds: names that were nearly meant, and what the owner's settings come to."""

from pathlib import Path

import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.settings.tree import TaskSettings
from meshnode.tasks.setup import terms_of, with_names


def test_a_mistyped_node_is_told_what_it_may_have_been() -> None:
    error = MeshError(ErrorCode.UNKNOWN_NODE, "No node of this mesh is called 'bern'.")
    told = with_names(error, "bern", ["barn", "attic"])
    assert (told.code, told.detail["near"]) == (ErrorCode.UNKNOWN_NODE, ["barn"])
    assert "Did you mean 'barn'?" in told.message
    assert with_names(error, "zzz", ["barn"]) is error
    several = MeshError(ErrorCode.CONFLICT, "2 nodes are called so.")
    assert with_names(several, "barn", ["barn"]) is several


def test_without_walls_a_task_does_not_find_the_agents_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHNODE_TOKEN", "secret")
    monkeypatch.setenv("EDITOR", "ed")
    terms = terms_of(TaskSettings(isolation="none", output_bytes_max=8192), data_dir=Path("/data"), trusts_user=True)
    assert (terms.isolated, terms.head_bytes + terms.tail_bytes) == (False, 8192)
    assert terms.environment["EDITOR"] == "ed"
    assert "MESHNODE_TOKEN" not in terms.environment
