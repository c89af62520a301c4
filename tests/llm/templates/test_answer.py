"""Thoughts, calls and text are told apart, and however the stream is cut, the sum is the same."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.llm.model import ReasoningDelta, TextDelta, ToolCallDelta
from meshnode.llm.templates.answer import AnswerParser
from meshnode.llm.templates.deepseek import HEADER_CHARS_MAX
from tests.support.deepseek_marks import deepseek

TOOLS = frozenset({"add", "get_weather"})


def read(pieces, family="hermes", tools=TOOLS, thinking=False):
    """Text, thought and calls as a client would put them together."""
    numbers = itertools.count()
    parser = AnswerParser(family, tools, lambda: f"id{next(numbers)}", thinking=thinking)
    text, thought, calls = "", "", []
    for delta in [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish():
        if isinstance(delta, TextDelta):
            assert delta.text, "an empty delta says nothing"
            text += delta.text
        elif isinstance(delta, ReasoningDelta):
            thought += delta.text
        elif delta.index == len(calls):
            assert delta.id == f"id{delta.index}"
            assert delta.name
            calls.append([delta.name, delta.arguments])
        else:
            assert delta.index == len(calls) - 1
            assert (delta.id, delta.name) == (None, None)
            calls[-1][1] += delta.arguments
    assert parser.calls == len(calls)
    return text, thought, [(name, arguments) for name, arguments in calls]


ADD = ("add", '{"a": 1}')

CASES = {
    "hermes": [
        ("Hello.", "Hello.", "", []),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", "", [ADD]),
        ('Sure.\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "Sure.", "", [ADD]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", "", [ADD]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "", [ADD]),
        ('<tool_call>{"name": "add", "arguments": null}</tool_call>', "", "", [("add", "{}")]),
        ('<tool_call>{"name": "add"}</tool_call>', "", "", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": {"a": "}</tool_call>\\""}}</tool_call>', "", "", [("add",
        '{"a": "}</tool_call>\\""}')]),
        (
            '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n<tool_call>\n'
            '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\nDone.',
            "Done.", "", [ADD, ("get_weather", '{"city": "Rome"}')],
        ),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "", []),
        ("a < b <tool> c", "a < b <tool> c", "", []),
        ("a <tool_call>no", "a <tool_call>no", "", []),
        ('a <tool_call>no <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "a <tool_call>no", "", [ADD]),
        ("<|START_TEXT|>a<|END_TEXT|>", "<|START_TEXT|>a<|END_TEXT|>", "", []),
        ("a <tool_call>", "a <tool_call>", "", []),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}', "", "", [ADD]),
        ('<tool_call>{"nam', '<tool_call>{"nam', "", []),
        ("<think>\nHm, \n</think>\n\nYes.", "Yes.", "Hm,", []),
        ('<think>Hm</think><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "", "Hm", [ADD]),
        ("<think>cut off", "", "cut off", []),
        ("<thin ice", "<thin ice", "", []),
        ("No <think>later</think>", "No <think>later</think>", "", []),
    ],
    "llama3": [
        ('{"name": "add", "parameters": {"a": 1}}', "", "", [ADD]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", "", [ADD]),
        ('{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 1}}', "", "", [ADD, ADD]),
        ('{"type": "function", "name": "add", "parameters": {"a": 1}}', "", "", [ADD]),
        ('{"answer": 1}', '{"answer": 1}', "", []),
        ('So: {"name": "add", "parameters": {"a": 1}}', 'So: {"name": "add", "parameters": {"a": 1}}', "", []),
        ('<|python_tag|>get_weather.call(city="Rome")', "", "", [("get_weather", '{"city": "Rome"}')]),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", "", []),
    ],
    "mistral": [
        ('[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]', "", "", [ADD]),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 1}}]', "", "",
        [ADD, ADD]),
        ("[TOOL_CALLS][no]", "[TOOL_CALLS][no]", "", []),
        ('[THINK]Hm[/THINK]Yes', "Yes", "Hm", []),
    ],
    "mistral_args": [
        ('[TOOL_CALLS]add[ARGS]{"a": 1}', "", "", [ADD]),
        ('[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{"city": "Rome"}', "", "", [ADD,
        ("get_weather", '{"city": "Rome"}')]),
        ("[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", "", []),
    ],
    "deepseek": [
        ("Hello.", "Hello.", "", []),
        ('<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>add\n```json\n{"a": 1}\n```<|tool_call_end|>'
        '<|tool_calls_end|>', "", "", [ADD]),
        ('<think>\nHm.\n</think>\n\nSure.\n<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>add\n```json\n'
        '{"a": 1}\n```<|tool_call_end|>\n<|tool_call_begin|>function<|tool_sep|>get_weather\n```json\n'
        '{"city": "Rome"}\n```<|tool_call_end|><|tool_calls_end|>\n', "Sure.", "Hm.",
        [ADD, ("get_weather", '{"city": "Rome"}')]),
        ('<|tool_call_begin|>function<|tool_sep|>add\n```json\n{"a": 1}\n```', "", "", [ADD]),
        ('<|tool_call_begin|>function<|tool_sep|>add\n```json\n{"a": 1}\n```\n<|tool_call_end|> Done.', "Done.", "",
        [ADD]),
        ('<|tool_call_begin|>function<|tool_sep|>rm\n```json\n{}\n```<|tool_call_end|>',
        '<|tool_call_begin|>function<|tool_sep|>rm\n```json\n{}\n```<|tool_call_end|>', "", []),
        ("a <|tool_calls_begin|> b", "a <|tool_calls_begin|> b", "", []),
        ('<|tool_calls_begin|> b <|tool_call_begin|>function<|tool_sep|>add\n```json\n{"a": 1}\n```<|tool_call_end|>',
        "<|tool_calls_begin|> b", "", [ADD]),
        ("<|tool_calls_begin|>```<|tool_calls_end|>", "<|tool_calls_begin|>```<|tool_calls_end|>", "", []),
        ("<|tool_calls_begin|><|tool_call_end|> b", "<|tool_calls_begin|><|tool_call_end|> b", "", []),
        ("<|tool_calls_begin|><|tool_call_begin|>fun", "<|tool_calls_begin|><|tool_call_begin|>fun", "", []),
        ("a <｜tool▁c", "a <｜tool▁c", "", []),
    ],
    "deepseek_args": [
        ('<|tool_calls_begin|><|tool_call_begin|>add<|tool_sep|>{"a": 1}<|tool_call_end|><|tool_call_begin|>get_weather'
        '<|tool_sep|>{"city": "}<|tool_call▁end｜"}<|tool_call_end|><|tool_calls_end|>', "", "",
        [ADD, ("get_weather", '{"city": "}<|tool_call▁end｜"}')]),
        ('<|tool_call_begin|>add<|tool_sep|>{"a": 1', "", "", [("add", '{"a": 1')]),
    ],
    "cohere": [
        ("Hello.", "Hello.", "", []),
        ("<|START_RESPONSE|>Hello.<|END_RESPONSE|>", "Hello.", "", []),
        ("<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>", "Yes.", "Hm.", []),
        ('<|START_THINKING|>I add.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "add", '
        '"parameters": {"a": 1}}\n]<|END_ACTION|>', "", "I add.", [ADD]),
        ('<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "add", "parameters": {"a": 1}}, {"tool_call_id": "1", '
        '"tool_name": "get_weather", "parameters": {"city": "]<|END_TEXT|>"}}]\n<|END_ACTION|><|START_RESPONSE|>Done.',
        "Done.", "", [ADD, ("get_weather", '{"city": "]<|END_TEXT|>"}')]),
        ('<|START_ACTION|>[{"tool_name": "add", "parameters": {"a": 1}}] So.', "So.", "", [ADD]),
        ('<|START_ACTION|>[{"tool_name": "add", "parameters": {"a": 1', "", "", [("add", '{"a": 1')]),
        ('<|START_ACTION|>[{"tool_name": "rm", "parameters": {}}]<|END_ACTION|>',
        '<|START_ACTION|>[{"tool_name": "rm", "parameters": {}}]<|END_ACTION|>', "", []),
        ('<|START_ACTION|>[{"name": "add", "parameters": {}}]', '<|START_ACTION|>[{"name": "add", "parameters": {}}]',
        "", []),
        ("a <|START_ACTION|> b", "a <|START_ACTION|> b", "", []),
        ('a<|END_<|START_ACTION|>[{"tool_name": "add", "parameters": {"a": 1}}]<|END_ACTION|>TEXT|>b',
        "a<|END_TEXT|>b", "", [ADD]),
        ("<|START_<|START_TEXT|>TEXT|>a<|END_TE", "<|START_TEXT|>a<|END_TE", "", []),
    ],
    "harmony": [
        ("<|channel|>final<|message|>Hello.", "Hello.", "", []),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>", "Yes.",
        "Hm.", []),
        ('<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>', "", "", [ADD]),
        ('<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I add.<|end|>'
        '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}', "I add.",
        "Hm.", [ADD]),
        (' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>', "", "", [ADD]),
        ("<|channel|>commentary to=functions.add<|message|><|call|>", "", "", [("add", "{}")]),
        ("<|channel|>commentary to=functions.rm<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.rm<|message|>{}", "", []),
        ("<|channel|>analysis<|message|>a<|end|><|channel|>analysis<|message|>b < c", "", "a\n\nb < c", []),
        ("Straight to the answer.", "Straight to the answer.", "", []),
        ("to be <|x", "to be <|x", "", []),
        ("<|channel|>fin", "", "", []),
    ],
}  # fmt: skip
for name in ("deepseek", "deepseek_args"):
    CASES[name] = [
        (deepseek(said), deepseek(text), thought, [(called, deepseek(given)) for called, given in calls])
        for said, text, thought, calls in CASES[name]
    ]
TABLE = [(family, *case) for family, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("family", "said", "text", "thought", "calls"), TABLE, ids=lambda value: str(value)[:40])
def test_what_is_read(family, said, text, thought, calls):
    assert read([said], family) == (text, thought, calls)
    assert read(list(said), family) == (text, thought, calls)


def test_a_call_is_told_before_it_is_whole():
    parser = AnswerParser("hermes", TOOLS, lambda: "x", thinking=False)
    (begun,) = parser.feed('<tool_call>{"name": "add", "arg')
    assert (begun.index, begun.id, begun.name, begun.arguments) == (0, "x", "add", "")
    (more,) = parser.feed('uments": {"a"')
    assert (more.arguments, more.name) == ('{"a"', None)


@pytest.mark.parametrize("family", [family for family in CASES if family != "harmony"])
def test_each_call_has_an_id_of_its_own_told_once_and_before_its_arguments(family):
    ids = map("call_{}".format, itertools.count())
    said = next(said for said, _, _, calls in CASES[family] if len(calls) == 2)
    parser = AnswerParser(family, TOOLS, ids.__next__, thinking=False)
    told = [delta for char in said for delta in parser.feed(char) if isinstance(delta, ToolCallDelta)]
    named = [delta for delta in told if delta.id is not None]
    assert [(delta.index, delta.id) for delta in named] == [(0, "call_0"), (1, "call_1")]
    assert all(delta.name is not None for delta in named)
    assert [told.index(delta) for delta in named] == [
        next(place for place, delta in enumerate(told) if delta.index == index) for index in (0, 1)
    ]


def test_text_is_not_held_longer_than_it_must():
    parser = AnswerParser("hermes", TOOLS, lambda: "x", thinking=False)
    assert [[delta.text for delta in parser.feed(piece)] for piece in ("Hel", "lo ", "<tool", "box>")] == [
        ["Hel"],
        ["lo"],
        [],
        [" <toolbox>"],
    ]


def test_text_behind_a_list_that_nobody_closes_is_told_at_once():
    parser = AnswerParser("cohere", TOOLS, lambda: "x", thinking=False)
    *_, last = parser.feed('<|START_ACTION|>[{"tool_name": "add", "parameters": {"a": 1}}] So')
    assert last == TextDelta(text="So", count=0)


@pytest.mark.parametrize("begun", ["", "function<|tool_sep|>" + " " * HEADER_CHARS_MAX + "add\n{"])
def test_a_header_that_goes_on_and_on_is_text_at_once(begun):
    said = deepseek("<|tool_call_begin|>" + begun).ljust(2 * HEADER_CHARS_MAX, "x")
    for pieces in ([said], list(said)):
        parser = AnswerParser("deepseek", TOOLS, lambda: "x", thinking=False)
        assert "".join(delta.text for piece in pieces for delta in parser.feed(piece)) == said


def test_without_tools_nothing_is_a_call():
    said = '<tool_call>{"name": "add", "arguments": {}}</tool_call> '
    assert read([said], tools=None) == (said, "", [])


def test_a_prompt_that_opened_the_thought():
    assert read(["Hm.\n</think>\n\nYes."], thinking=True) == ("Yes.", "Hm.", [])


_FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[", "]", "<|python_tag|>", "{",
     "<|START_ACTION|>", "<|END_ACTION|>", '"tool_name"', "<|START_RESPONSE|>", "<|END_TEXT|>", "<|START_THINKING|>",
     "<|END_THINKING|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>",
     "analysis", "to=functions.add", "final",
     *map(deepseek, ("<|tool_calls_begin|>", "<|tool_call_begin|>", "function<|tool_sep|>add", "<|tool_sep|>")),
     *map(deepseek, ("<|tool_call_end|>", "<|tool_calls_end|>")), "\n```json\n", "`",
    "}", '"name"', ": ", ":",
     '"add"', '"rm"', "add", '"arguments"', '"parameters"', '{"a": 1}', '{"name": "add", "arguments": {"b": "c"}}',
     ", ", "; ", " ", "\n", "text",
     "<", '"', "\\", "null", '"{}"', "1", ".call(", ")"]
)  # fmt: skip


@given(
    st.sampled_from(sorted(CASES)),
    st.lists(_FRAGMENTS, max_size=14).map("".join),
    st.lists(st.integers(0, 200), max_size=10),
    st.booleans(),
)
def test_any_cut_gives_the_same(family, said, places, thinking):
    whole = read([said], family, thinking=thinking)
    edges = sorted({0, len(said), *(place % (len(said) + 1) for place in places)})
    assert read([said[a:b] for a, b in itertools.pairwise(edges)], family, thinking=thinking) == whole
    assert read(list(said), family, thinking=thinking) == whole


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(TOOLS)), st.dictionaries(st.text(max_size=5), _JSON, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_what_is_written_well_is_read_well(calls, ascii_only):
    said = "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': given}, ensure_ascii=ascii_only)}\n</tool_call>"
        for name, given in calls
    )
    text, thought, found = read(list(said))
    assert (text, thought) == ("", "")
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
