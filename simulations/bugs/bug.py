"""What a re-injectable bug is: a name, a sentence, a patch of protocol classes, and the scenario that finds it."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Patches:
    """Replaced attributes of classes and modules, put back at the end."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Replace an attribute; returns what was there.

        Raises AttributeError or TypeError when the code has moved on: it is gone, or called otherwise.
        """
        original = owner.__dict__[name] if name in vars(owner) else getattr(owner, name)
        if inspect.isfunction(original) and inspect.isfunction(value):
            _require_same_calls(original, value)
        self._replaced.append((owner, name, original))
        setattr(owner, name, value)
        return original

    def undo(self) -> None:
        """Put everything back, the last first."""
        while self._replaced:
            owner, name, original = self._replaced.pop()
            setattr(owner, name, original)


def _require_same_calls(original: Callable[..., Any], value: Callable[..., Any]) -> None:
    """Raises TypeError unless `value` takes every call that `original` takes."""
    parameters = inspect.signature(original).parameters.values()
    named = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    placed = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    try:
        inspect.signature(value).bind(*placed, **dict.fromkeys(named))
    except TypeError as error:
        raise TypeError(f"{original.__qualname__} is called otherwise now: {error}") from error


@dataclass(frozen=True, slots=True)
class Bug:
    """`inject` does the damage; it is looked for in `scenario` with these options, one seed after the other."""

    name: str
    sentence: str
    inject: Callable[[Patches], None]
    scenario: str = "churn"
    nodes: int | None = None
    pattern: str | None = None
    duration_s: float | None = None

    @contextmanager
    def injected(self) -> Iterator[None]:
        """The protocol has the bug inside, and only inside."""
        patches = Patches()
        try:
            self.inject(patches)
            yield
        finally:
            patches.undo()
