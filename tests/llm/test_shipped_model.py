"""The model in the package: it is small, says what it is, and does in an unmodified llama.cpp what its card says."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest

import meshnode.llm
from meshnode.llm.model import AnswerFormat, Message, TextDelta, Tool, ToolCall, ToolChoice
from meshnode.llm.templates.answer import AnswerParser
from meshnode.llm.templates.capabilities import Capabilities, probed
from meshnode.llm.templates.composing import Composer
from meshnode.llm.templates.forcing import grammar_for
from meshnode.llm.templates.model import RenderRequest, TemplateSource
from meshnode.llm.templates.sandbox import compiled
from tests.house.source import ROOT

BYTES_MAX = 8_000_000
FILE = Path(meshnode.llm.__file__).parent / "data" / "meshnode-demo.gguf"
CARD = FILE.with_name("README.md")
TEMPLATE = (ROOT / "scripts" / "demo_model" / "template.jinja").read_text().rstrip("\n")
SOURCE = TemplateSource(template=TEMPLATE, architecture="llama", bos="<s>", eos="</s>")

WEATHER = Tool(
    name="get_weather",
    description="Weather of a city",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    strict=True,
)
TIME = Tool(name="get_time", description="Time in a city", parameters=WEATHER.parameters)


def prompt(*messages, tools=()):
    return Composer().compose(RenderRequest(source=SOURCE, messages=messages, tools=tuple(tools))).text


def user(text):
    return Message(role="user", content=text)


def test_it_is_small_and_its_card_names_it():
    assert FILE.stat().st_size <= BYTES_MAX
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() in CARD.read_text()


def test_its_template_is_the_one_that_it_was_trained_with():
    assert TEMPLATE.encode() in FILE.read_bytes()


def test_its_template_can_say_everything():
    assert probed(compiled(TEMPLATE), {"bos_token": "<s>"}) == Capabilities(True, True, True, True, False)


def test_a_whole_exchange_with_a_tool():
    call = ToolCall(id="abcdefghi", name="get_weather", arguments='{"city": "Rome"}')
    said = prompt(
        Message(role="system", content="Be kind."),
        user("Weather in Rome?"),
        Message(role="assistant", tool_calls=(call, call)),
        Message(role="tool", content='{"temperature": 20}', tool_call_id="abcdefghi"),
        tools=[WEATHER],
    )
    assert said == (
        "<|im_start|>system\nBe kind.\n\nYou may call these tools:\n<tools>\n"
        '{"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": '
        '{"city": {"type": "string"}}, "required": ["city"]}}\n</tools>\nA call looks like this:\n<tool_call>\n'
        '{"name": NAME, "arguments": {...}}\n</tool_call><|im_end|>\n<|im_start|>user\nWeather in Rome?<|im_end|>\n'
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}'
        "\n</tool_call><|im_end|>\n<|im_start|>user\n"
        '<tool_response>\n{"temperature": 20}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )


@pytest.fixture(scope="module")
def model():
    """The model in llama.cpp, without its special buffers: on AMX machines they end the process."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra `llm`)")
    import llama_cpp
    from llama_cpp import llama_cpp as library

    default = library.llama_model_default_params

    def without_extra_buffers():
        made = default()
        made.use_extra_bufts = False
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "llama_model_default_params", without_extra_buffers)
        loaded = llama_cpp.Llama(str(FILE), n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    yield loaded
    loaded.close()


def answer(model, text, grammar=None, tokens_max=200):
    """What it says greedily, and why it ended."""
    import llama_cpp

    forced = llama_cpp.LlamaGrammar.from_string(grammar, verbose=False) if grammar else None
    made = model.create_completion(text, temperature=0.0, max_tokens=tokens_max, grammar=forced)
    (choice,) = made["choices"]
    return choice["text"], choice["finish_reason"]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("What is meshnode?", "meshnode is one agent, the same on every machine. The machines find each other, "
        "share work and "
         "files, and split large language models between them."),
        ("Hello!", "Hello! How can I help you?"),
        ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
        ("What is 2 + 3?", "2 + 3 = 5"),
        ("Who won the world cup in 1998?",
        "I do not know that. I am a very small demo model; pull a larger one for real questions."),
    ],
)  # fmt: skip
def test_it_answers(model, question, said):
    assert answer(model, prompt(user(question))) == (said, "stop")


def test_it_says_what_it_is(model):
    said, reason = answer(model, prompt(user("What are you?")))
    assert reason == "stop"
    assert "demo model" in said
    assert "very small" in said


def test_a_long_story_is_long_enough_to_watch(model):
    said, _ = answer(model, prompt(user("Tell me a long story about a fox.")), tokens_max=400)
    assert said.startswith("Once there was a fox")
    assert len(model.tokenize(said.encode(), add_bos=False)) >= 100


def test_the_files_own_template_gives_the_same_prompt(model):
    made = model.create_chat_completion([{"role": "user", "content": "Hello!"}], temperature=0.0)
    assert made["choices"][0]["message"]["content"] == answer(model, prompt(user("Hello!")))[0]


@pytest.mark.parametrize("question", ["What is the weather in Paris?", "What time is it in Rome?", "Hello!"])
def test_forced_calls_end_and_are_read(model, question):
    tools = [WEATHER, TIME]
    grammar = grammar_for("hermes", tools, ToolChoice(mode="required", parallel=False), AnswerFormat())
    said, reason = answer(model, prompt(user(question), tools=tools), grammar)
    assert reason == "stop"
    parser = AnswerParser(
        "hermes", frozenset({"get_weather", "get_time"}), map(str, itertools.count()).__next__, thinking=False
    )
    deltas = parser.feed(said) + parser.finish()
    assert not any(isinstance(delta, TextDelta) for delta in deltas)
    assert parser.calls == 1
    assert isinstance(json.loads("".join(delta.arguments for delta in deltas))["city"], str)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": ["string", "null"], "maxLength": 20},
    },
    "required": ["name", "age", "email"],
    "additionalProperties": False,
}
SCHEMAS = [
    {
        "properties": {"city": {"type": "string"}, "temperature": {"type": "integer"}},
        "required": ["city", "temperature"],
        "additionalProperties": False,
    },
    {
        "properties": {"answer": {"enum": ["yes", "no"]}, "why": {"type": "string", "maxLength": 40}},
        "required": ["answer", "why"],
    },
    {
        "properties": {"people": {"type": "array", "minItems": 2, "maxItems": 2, "items": PERSON}},
        "required": ["people"],
    },
    {
        "properties": {
            "ratio": {"type": "number", "minimum": 0, "maximum": 1},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["ratio", "day"],
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: ",".join(schema["properties"]))
@pytest.mark.parametrize("question", ["Give me an example as JSON.", "What is meshnode?", "Tell me about Paris."])
def test_a_forced_schema_ends_and_holds(model, schema, question):
    grammar = grammar_for("hermes", [], ToolChoice(), AnswerFormat(kind="json_schema", schema=schema))
    said, reason = answer(model, prompt(user(question)), grammar, tokens_max=300)
    assert reason == "stop"
    assert set(json.loads(said)) == set(schema["properties"])


def test_a_forced_object_ends(model):
    grammar = grammar_for("hermes", [], ToolChoice(), AnswerFormat(kind="json_object"))
    said, reason = answer(model, prompt(user("Give me JSON with name and age.")), grammar)
    assert reason == "stop"
    assert isinstance(json.loads(said), dict)


@pytest.mark.parametrize("family", ["hermes", "llama3", "mistral", "mistral_args"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: ",".join(schema["properties"]))
def test_llama_cpp_takes_every_grammar_that_we_write(model, family, schema):
    from llama_cpp import llama_cpp as library

    vocabulary = library.llama_model_get_vocab(model._model.model)
    tools = [WEATHER, Tool(name="other", parameters=schema)]
    wanted = AnswerFormat(kind="json_schema", schema=schema)
    for grammar in (
        grammar_for(family, tools, ToolChoice(mode="required"), AnswerFormat()),
        grammar_for(family, tools, ToolChoice(), wanted, thinking=True),
    ):
        sampler = library.llama_sampler_init_grammar(vocabulary, grammar.encode(), b"root")
        assert sampler, grammar
        library.llama_sampler_free(sampler)
    assert not library.llama_sampler_init_grammar(vocabulary, b'root ::= "a', b"root")
