"""tool_choice and response_format become one grammar, and what is forced is read again as calls."""

import itertools

import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import AnswerFormat, Tool, ToolCallDelta, ToolChoice
from meshnode.llm.templates.answer import AnswerParser
from meshnode.llm.templates.families import HARMONY_FINAL
from meshnode.llm.templates.forcing import grammar_for
from meshnode.llm.templates.model import TOOLS_MAX
from tests.support.deepseek_marks import deepseek
from tests.support.gbnf import Grammar

ADD = Tool(name="add", parameters={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
PING = Tool(name="ping")
TEXT, JSON = AnswerFormat(), AnswerFormat(kind="json_object")
SCHEMA = AnswerFormat(kind="json_schema", schema={"properties": {"ok": {"type": "boolean"}}, "required": ["ok"]})
REQUIRED, NAMED = ToolChoice(mode="required"), ToolChoice(name="add")

BEGINS, ENDS = deepseek("<|tool_calls_begin|>"), deepseek("<|tool_calls_end|>")
ONE = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "llama3": '{"name": "add", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]',
    "mistral_args": '[TOOL_CALLS]add[ARGS]{"a": 1}',
    "cohere": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "add", "parameters": {"a": 1}}\n]'
    "<|END_ACTION|>",
    "deepseek": deepseek(
        '<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>add\n```json\n{"a": 1}\n```<|tool_call_end|>'
        "<|tool_calls_end|>"
    ),
    "deepseek_args": deepseek(
        '<|tool_calls_begin|><|tool_call_begin|>add<|tool_sep|>{"a": 1}<|tool_call_end|><|tool_calls_end|>'
    ),
}
TWO = {
    "cohere": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "add", "parameters": {"a": 1}},\n    '
    '{"tool_call_id": "1", "tool_name": "add", "parameters": {"a": 1}}\n]<|END_ACTION|>',
    "hermes": ONE["hermes"] + "\n" + ONE["hermes"],
    "llama3": ONE["llama3"] + "; " + ONE["llama3"],
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 1}}]',
    "mistral_args": ONE["mistral_args"] * 2,
    "deepseek": ONE["deepseek"].replace(ENDS, "\n") + ONE["deepseek"].removeprefix(BEGINS),
    "deepseek_args": ONE["deepseek_args"].replace(ENDS, "") + ONE["deepseek_args"].removeprefix(BEGINS),
}


@pytest.mark.parametrize("family", ONE)
def test_required_calls_are_forced_and_read_again(family):
    grammar = Grammar(grammar_for(family, [ADD, PING], REQUIRED, TEXT))
    single = Grammar(grammar_for(family, [ADD, PING], ToolChoice(mode="required", parallel=False), TEXT))
    assert grammar.accepts(ONE[family])
    assert grammar.accepts(TWO[family])
    assert single.accepts(ONE[family])
    assert not single.accepts(TWO[family])
    assert not grammar.accepts("No.")
    assert not grammar.accepts(ONE[family].replace('"a": 1', '"b": 1'))
    parser = AnswerParser(family, frozenset({"add"}), map(str, itertools.count()).__next__, thinking=False)
    deltas = parser.feed(TWO[family]) + parser.finish()
    assert all(isinstance(delta, ToolCallDelta) for delta in deltas)
    assert parser.calls == 2


def test_a_named_tool_is_the_only_one_and_comes_once():
    grammar = Grammar(grammar_for("hermes", [ADD, PING], NAMED, TEXT))
    assert grammar.accepts(ONE["hermes"])
    assert not grammar.accepts(TWO["hermes"])
    assert not grammar.accepts('<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>')


@pytest.mark.parametrize("choice", [ToolChoice(), ToolChoice(mode="none")])
def test_free_text_is_free(choice):
    assert grammar_for("hermes", [ADD], choice, TEXT) is None


def test_a_format_with_tools_at_will_allows_both():
    grammar = Grammar(grammar_for("hermes", [ADD], ToolChoice(), SCHEMA))
    assert grammar.accepts('{"ok": true}')
    assert grammar.accepts(ONE["hermes"])
    assert not grammar.accepts('{"ok": 1}')


def test_a_format_without_tools_allows_only_itself():
    for tools, choice in (([], ToolChoice()), ([ADD], ToolChoice(mode="none"))):
        grammar = Grammar(grammar_for("hermes", tools, choice, JSON))
        assert grammar.accepts('{"a": [1, 2]}')
        assert not grammar.accepts("[1]")
        assert not grammar.accepts(ONE["hermes"])


def test_a_required_call_goes_before_the_format():
    grammar = Grammar(grammar_for("hermes", [ADD], REQUIRED, SCHEMA))
    assert grammar.accepts(ONE["hermes"])
    assert not grammar.accepts('{"ok": true}')


def test_a_thought_may_come_first():
    grammar = Grammar(grammar_for("hermes", [], ToolChoice(), SCHEMA, thinking=True))
    assert grammar.accepts('Is 1 < 2? </thin> Yes.\n</think>\n\n{"ok": true}')
    assert not grammar.accepts('{"ok": true}')


@pytest.mark.parametrize("rest", ["", "<", "<<", "</", "</thin</", "1 <"])
def test_a_thought_that_ends_with_the_beginning_of_its_mark_ends(rest):
    """Else the answer would be thought to the last token, and the reader, who sees the mark, would show it."""
    grammar = Grammar(grammar_for("hermes", [], ToolChoice(), SCHEMA, thinking=True))
    assert grammar.accepts(f'{rest}</think>{{"ok": true}}')
    assert not grammar.accepts(f'{rest}{{"ok": true}}')
    assert not grammar.accepts(f'{rest}</think>x</think>{{"ok": true}}'), "the first mark ends it"


def test_cohere_thinks_and_answers_between_marks():
    thought = "<|START_THINKING|>Is 1 < 2 <|? Yes.<|END_THINKING|>"
    grammar = Grammar(grammar_for("cohere", [ADD], ToolChoice(), SCHEMA))
    for said in ("", "<|START_RESPONSE|>", thought, f"{thought}<|START_RESPONSE|>"):
        assert grammar.accepts(f'{said}{{"ok": true}}'), said
    assert grammar.accepts(f"{thought}{ONE['cohere']}")
    assert not grammar.accepts(f"<|START_RESPONSE|>{ONE['cohere']}")
    begun = Grammar(grammar_for("cohere", [ADD], REQUIRED, TEXT, thinking=True))
    assert begun.accepts(thought.removeprefix("<|START_THINKING|>") + ONE["cohere"])
    assert begun.accepts(thought.removeprefix("<|START_THINKING|>") + ONE["cohere"].replace('"0"', '"10"'))
    assert not begun.accepts(thought.removeprefix("<|START_THINKING|>") + ONE["cohere"].replace('"0"', '""'))
    assert not begun.accepts(ONE["cohere"])


@pytest.mark.parametrize(("family", "head"), [("cohere", "<|START_RESPONSE|>"), ("harmony", HARMONY_FINAL)])
def test_a_mark_stands_before_each_answer_that_a_schema_allows(family, head):
    either = AnswerFormat(kind="json_schema", schema={"enum": ["yes", "no"]})
    grammar = Grammar(grammar_for(family, [], ToolChoice(), either))
    assert grammar.accepts(f'{head}"yes"')
    assert grammar.accepts(f'{head}"no"')
    assert grammar.accepts('"no"') == (family == "cohere"), "there the mark may be left out"


def test_a_grammar_of_ones_own_goes_through():
    own = AnswerFormat(kind="grammar", gbnf='root ::= "yes"')
    assert grammar_for("hermes", [], ToolChoice(), own) == 'root ::= "yes"'


@pytest.mark.parametrize(
    ("tools", "choice", "form", "words"),
    [
        ([PING] * 2, ToolChoice(), TEXT, "Two tools"),
        ([Tool(name=f"t{i}") for i in range(10_000)], ToolChoice(), TEXT, f"at most {TOOLS_MAX}"),
        ([Tool(name="a b")], ToolChoice(), TEXT, "no name"),
        ([Tool(name="")], ToolChoice(), TEXT, "no name"),
        ([], REQUIRED, TEXT, "no tools"),
        ([PING], NAMED, TEXT, "'add'"),
        ([], ToolChoice(), AnswerFormat(kind="json_schema"), "without a schema"),
        ([], ToolChoice(), AnswerFormat(kind="grammar"), "missing"),
        ([PING], ToolChoice(), AnswerFormat(kind="grammar", gbnf='root ::= "x"'), "exclude"),
        ([Tool(name="x", strict=True, parameters={"type": "string", "pattern": "a"})], REQUIRED, TEXT, "'pattern'"),
    ],
)
def test_what_does_not_go_together_is_refused(tools, choice, form, words):
    with pytest.raises(MeshError) as refused:
        grammar_for("hermes", tools, choice, form)
    assert refused.value.code is ErrorCode.BAD_REQUEST
    assert words in refused.value.message


THOUGHT = "<|channel|>analysis<|message|>Is 1 < 2? <<Yes|<|end|><|start|>assistant"
HARMONY_CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'


@pytest.mark.parametrize("thought", ["", THOUGHT])
def test_harmony_thinks_first_and_names_its_channel(thought):
    forced = Grammar(grammar_for("harmony", [ADD, PING], REQUIRED, TEXT))
    assert forced.accepts(thought + HARMONY_CALL)
    assert not forced.accepts(thought + HARMONY_CALL.replace('"a": 1', '"b": 1'))
    assert not forced.accepts(thought + "<|channel|>final<|message|>No.")
    either = Grammar(grammar_for("harmony", [ADD], ToolChoice(), SCHEMA))
    assert either.accepts(thought + HARMONY_CALL)
    assert either.accepts(thought + '<|channel|>final<|message|>{"ok": true}')
    assert not either.accepts(thought + '<|channel|>final<|message|>{"ok": 1}')
    assert not either.accepts(thought + '{"ok": true}')
    assert grammar_for("harmony", [ADD], ToolChoice(), TEXT) is None
