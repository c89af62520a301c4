"""What is typed at the prompt of a chat: lines, and texts of several."""

import pytest

from meshnode.cli.prompt import Prompt


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["plain"], ["plain"]),
        (['"""one line"""'], ["one line"]),
        (['"""', "a", "", "b", '"""', "c"], ["a\n\nb", "c"]),
        (['  """a', 'b"""'], ["a\nb"]),
        (['"""', "never closed"], ["never closed"]),
        (['"""', '"""'], [""]),
    ],
)
def test_texts_of_several_lines(monkeypatch: pytest.MonkeyPatch, typed: list[str], read: list[str]) -> None:
    lines = iter(typed)

    def take(_prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", take)
    seen = []
    with Prompt(interactive=False) as prompt:
        while True:
            try:
                seen.append(prompt.read())
            except EOFError:
                break
    assert seen == read
