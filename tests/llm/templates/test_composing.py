"""What a template lacks is made up for, for the templates that are out there in all their kinds."""

import json

import pytest

from meshnode.llm.model import Message, Tool, ToolCall
from meshnode.llm.templates.composing import Composer
from meshnode.llm.templates.model import Refusal, RenderedPrompt, RenderRequest, TemplateSource
from tests.support.deepseek_marks import deepseek

PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
)
HERMES = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{%- for m in messages %}[{{ m.role }}] {{ m.content }}{% for call in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}\n{% endfor %}"
)
AS_TEXT = HERMES.replace("call.function.arguments | tojson", "call.function.arguments")
MISTRAL = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}"
    "{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be 9 long') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}'
    '"}{% endfor %}]'
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }} {{ m.tool_call_id }}[/TOOL_RESULTS]{% else %}"
    "[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
# As gpt-oss's own: one call of a message is written, a result belongs to the last call, a thought has its own name.
HARMONY = (
    "{% set last = namespace(name='') %}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}{% if m.content and m.thinking %}{{ raise_exception('not both') }}{% endif %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% set call = m.tool_calls[0].function %}{% set last.name = call.name %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}"
    "<|call|>{% elif m.role == 'tool' %}<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
ADD = Tool(name="add", description="Adds", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})
SYSTEM, USER, ANSWER = (
    Message(role=role, content=text) for role, text in (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))
)
CALLED = Message(role="assistant", tool_calls=(ToolCall(id="call_0123456789", name="add", arguments='{"a": 1}'),))
RESULT = Message(role="tool", content="2", tool_call_id="call_0123456789")


def compose(template, messages, tools=(), **more):
    source = {
        "bos": "<s>",
        "eos": "</s>",
        **{key: more.pop(key) for key in ("adds_bos", "architecture", "tool_template") if key in more},
    }
    request = RenderRequest(
        source=TemplateSource(template=template, **source), messages=tuple(messages), tools=tuple(tools), **more
    )
    # Through the wire's own form, as the worker sees it.
    return Composer().compose(request)


def text_of(*arguments, **more):
    made = compose(*arguments, **more)
    assert isinstance(made, RenderedPrompt), made
    return made.text


def test_the_tokeniser_adds_the_only_bos():
    assert text_of(PLAIN, [USER]) == "[user] Hi\n[assistant]"
    assert text_of("{{ bos_token }}" + PLAIN, [USER]) == "[user] Hi\n[assistant]"


def test_a_tokeniser_that_adds_none_gets_what_the_template_writes():
    made = compose(PLAIN, [USER], adds_bos=False)
    assert (made.text, made.add_bos) == ("<s>[user] Hi\n[assistant]", False)


def test_no_generation_prompt():
    assert text_of(PLAIN, [USER], add_generation_prompt=False) == "[user] Hi\n"


def test_all_system_messages_become_one_in_front():
    developer = Message(role="developer", content="Be short.")
    assert (
        text_of(PLAIN, [USER, SYSTEM, ANSWER, developer])
        == "[system] Be kind.\n\nBe short.\n[user] Hi\n[assistant] Hello\n[assistant]"
    )


def test_without_a_system_role_the_first_question_carries_it():
    assert text_of(TURNS, [SYSTEM, USER]) == "<user>Be kind.\n\nHi"
    assert text_of(TURNS, [SYSTEM]) == "<user>Be kind."


def test_neighbours_of_one_role_are_put_together_only_where_turns_must_alternate():
    assert text_of(TURNS, [USER, USER, ANSWER]) == "<user>Hi\n\nHi<assistant>Hello"
    assert text_of(PLAIN, [USER, USER]) == "[user] Hi\n[user] Hi\n[assistant]"


def test_what_cannot_be_mended_is_refused_in_the_templates_words():
    assert compose(TURNS, [ANSWER]) == Refusal(words="the template refuses this conversation: Roles must alternate")


def test_a_template_with_tools_gets_them_as_they_are():
    made = compose(HERMES, [USER, CALLED, RESULT], [ADD])
    assert made.family == "hermes"
    assert json.loads(made.text.partition("<tools>")[2].partition("</tools>")[0])["function"]["name"] == "add"
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in made.text
    assert "[tool] 2" in made.text


def test_a_template_that_wants_arguments_as_text_gets_text():
    assert '"arguments": {"a": 1}' in text_of(AS_TEXT, [USER, CALLED, RESULT], [ADD])


def test_arguments_that_are_no_json_are_shown_as_they_were():
    broken = Message(role="assistant", tool_calls=(ToolCall(id="x", name="add", arguments="{oops"),))
    assert '{"arguments": "{oops"}' in text_of(HERMES, [USER, broken])


@pytest.mark.parametrize(
    ("fence", "family", "call"),
    [
        ("```json", "deepseek", 'function<|tool_sep|>add\n```json\n{"a": 1}\n```'),
        ("", "deepseek_args", 'add<|tool_sep|>{"a": 1}'),
    ],
)
def test_deepseeks_template_tells_nothing_of_tools_so_they_are_explained_in_its_own_format(fence, family, call):
    template = deepseek(PLAIN + "{% if false %}<|tool_calls_begin|><|tool_call_begin|>" + fence + "{% endif %}")
    made = compose(template, [USER, CALLED, RESULT], [ADD])
    assert made.family == family
    assert "<tool_call>" not in made.text
    assert made.text.count(deepseek("<|tool_calls_begin|>")) == 2, (
        "in the explanation, and in the call of an earlier turn"
    )
    written = f"<|tool_calls_begin|><|tool_call_begin|>{call}<|tool_call_end|><|tool_calls_end|>"
    assert f"[assistant] {deepseek(written)}" in made.text
    bare = Message(role="assistant", tool_calls=(*CALLED.tool_calls, ToolCall(id="call_2", name="ping", arguments="")))
    one, another = f"<|tool_call_begin|>{call}<|tool_call_end|>", call.replace("add", "ping").replace('{"a": 1}', "{}")
    written = f"<|tool_calls_begin|>{one}\n<|tool_call_begin|>{another}<|tool_call_end|><|tool_calls_end|>"
    assert f"[assistant] {deepseek(written)}" in text_of(template, [USER, bare], [ADD])


@pytest.mark.parametrize(("ending", "thinking"), [("<|START_THINKING|>", True), ("", False)])
def test_cohere_is_known_by_its_action_mark_and_may_be_led_into_a_thought(ending, thinking):
    template = (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}[{{ m.role }}] "
        "{{ m.content }}{% for c in m.tool_calls or [] %}<|START_ACTION|>{{ c.function.name }} "
        "{{ c.function.arguments|tojson }}<|END_ACTION|>{% endfor %}{% endfor %}" + ending
    )
    made = compose(template, [USER, CALLED, RESULT], [ADD])
    assert (made.family, made.thinking) == ("cohere", thinking)
    assert made.text.startswith("add [user] Hi")
    assert '<|START_ACTION|>add {"a": 1}<|END_ACTION|>' in made.text


@pytest.mark.parametrize("mark", ["", "[TOOL_CALLS]", "<|START_ACTION|>", "<|python_tag|>"])
def test_a_template_without_tools_has_them_explained(mark):
    """In the format that is read of its model then, whatever marks the template has for calls that it cannot write."""
    made = compose(PLAIN + f"{{% if false %}}{mark}{{% endif %}}", [USER, CALLED, RESULT], [ADD])
    assert made.family == "hermes"
    assert made.text.startswith("[system] # Tools")
    assert '"name": "add"' in made.text
    assert '[assistant] <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in made.text
    assert "[user] <tool_response>\n2\n</tool_response>" in made.text


def test_mistral_gets_ids_of_nine_that_still_match():
    made = compose(MISTRAL, [USER, CALLED, RESULT], [ADD])
    assert made.family == "mistral"
    call_id = made.text.partition('"id": "')[2][:9]
    assert call_id.isalnum()
    assert f"[TOOL_RESULTS]2 {call_id}[/TOOL_RESULTS]" in made.text


def test_a_template_of_its_own_for_tools():
    both = {"tool_template": HERMES}
    assert "<tools>" in text_of(PLAIN, [USER], [ADD], **both)
    assert text_of(PLAIN, [USER], **both) == "[user] Hi\n[assistant]"


@pytest.mark.parametrize(
    ("architecture", "text", "stop"),
    [
        (
            "llama",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>",
        ),
        ("gemma3", "<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
        ("phi3", "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n", "<|end|>"),
    ],
)
def test_without_a_template_the_architecture_says(architecture, text, stop):
    made = compose(None, [SYSTEM, USER], architecture=architecture)
    assert (made.text, made.stops) == (text, (stop,))


def test_a_prompt_that_opens_a_thought():
    assert compose(PLAIN + "<think>\n", [USER]).thinking
    assert not compose(PLAIN + "<think>\n\n</think>\n", [USER]).thinking


def test_what_the_templates_of_the_hub_expect():
    template = (
        "{%- for m in messages %}\n    {% if m.role == 'assistant' %}{% continue %}{% endif %}\n{% generation %}"
        "{{ m.content }}{% endgeneration %}\n"
        "    {%- break %}\n{% endfor %}"
        "{{ strftime_now('%Y') }} {{ {'b': '<\u00e9>', 'a': 1} | tojson }} {{ [1] | tojson(indent=2) }}"
        " {{ enable_thinking }} {{ eos_token }}"
        "{%- set ns = namespace(x=1) %}{% set ns.x = 2 %} {{ ns.x }}{{ missing is defined }}"
        "{{ documents is none }}{{ tools is none }}"
    )
    made = text_of(template, [ANSWER, USER], now=1.6e9, template_kwargs={"enable_thinking": False})
    assert made == 'Hi2020 {"b": "<\u00e9>", "a": 1} [\n  1\n] False </s> 2FalseTrueTrue'


def test_reserved_names_are_not_for_the_caller():
    assert compose(PLAIN, [USER], template_kwargs={"messages": []}) == Refusal(
        words="chat_template_kwargs may not set 'messages'"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.x.y }}",
        "{{ nothing() }}",
        "{{ 'a' + 1 }}",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_fails_is_refused(template):
    made = compose(template, [USER])
    assert isinstance(made, Refusal)
    assert not made.hostile


def test_harmony_gets_each_call_with_its_result_and_thoughts_by_their_name():
    calls = tuple(ToolCall(id=f"c{n}", name=name, arguments=f'{{"a": {n}}}') for n, name in enumerate(("add", "sub")))
    asked = Message(role="assistant", content="Let me see.", reasoning="Two sums.", tool_calls=calls)
    results = [Message(role="tool", content=f"result {n}", tool_call_id=f"c{n}") for n in (1, 0)]
    made = compose(HARMONY, [USER, asked, *results, USER], [ADD])
    assert made.family == "harmony"
    said = made.text.partition("Hi<|end|>")[2]
    assert said == (
        "<|start|>assistant<|channel|>analysis<|message|>Two sums.\n\nLet me see.<|end|>"
        '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 0}<|call|>'
        '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"result 0"<|end|>'
        '<|start|>assistant to=functions.sub<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        '<|start|>functions.sub to=assistant<|channel|>commentary<|message|>"result 1"<|end|>'
        "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    )
