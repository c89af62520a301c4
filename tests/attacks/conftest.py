"""Attacks on stages run on the tiny models of the engine's own tests."""

from tests.llm.engine.conftest import cut, llama, pytest_collection_modifyitems, spec

__all__ = ["cut", "llama", "pytest_collection_modifyitems", "spec"]
