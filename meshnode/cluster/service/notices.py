"""What the person at this machine should know and do something about, as `meshnode status` shows it.

Whoever finds a trouble puts it here under a name of its own, and takes it away when it is over.
"""

from collections.abc import Callable


class Notices:
    """Standing notices by name, in the order in which they came."""

    def __init__(self, *asked: Callable[[], str | None]) -> None:
        """`asked`: troubles that are known to somebody else, who is asked at each reading."""
        self._asked = asked
        self._texts: dict[str, str] = {}

    def put(self, name: str, text: str) -> bool:
        """Say this under this name. True if it was not said before."""
        news = self._texts.get(name) != text
        self._texts[name] = text
        return news

    def clear(self, name: str) -> bool:
        """Say it no more. True if it was said."""
        return self._texts.pop(name, None) is not None

    def __contains__(self, name: object) -> bool:
        return name in self._texts

    def texts(self) -> list[str]:
        """All that stand."""
        return [*self._texts.values(), *filter(None, (ask() for ask in self._asked))]
