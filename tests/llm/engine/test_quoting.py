"""No name of a control token that somebody said is taken for one; the template's are, and other text stays whole."""

from hypothesis import given
from hypothesis import strategies as some

from meshnode.llm.engine.quoting import cuts

NAMES = ("<|a|>", "<a>", "|>", "aa", "[A]", "x")


def chunks(text, where):
    ends = [0, *where, len(text)]
    return [(ends[n], ends[n + 1]) for n in range(len(ends) - 1)]


def places(text, name, first, end):
    return [at for at in range(first, end - len(name) + 1) if text.startswith(name, at)]


@given(some.text("<|a>[]A x", max_size=40), some.lists(some.integers(0, 40), max_size=6))
def test_every_name_that_touches_quoted_words_is_cut_and_no_other(text, ends):
    ends = sorted({min(end, len(text)) for end in ends})
    quoted = [(ends[n], ends[n + 1]) for n in range(0, len(ends) - 1, 2)]
    where = cuts(text, quoted, NAMES)
    assert where == sorted(set(where))
    touching = {
        (at, at + len(name))
        for name in NAMES if len(name) > 1
        for at in places(text, name, 0, len(text))
        if any(at < end and at + len(name) > first for first, end in quoted)
    }  # fmt: skip
    for first, end in touching:
        assert any(first < cut < end for cut in where)
    for cut in where:
        assert any(first < cut < end for first, end in touching)


def test_innocent_words_and_the_templates_own_names_are_left():
    text = "<|a|>user\nhello<|a|>"
    assert cuts(text, [(10, 15)], NAMES) == []
    assert cuts(text, [], NAMES) == []
    assert cuts(text, [(0, 5)], NAMES) == [4]
