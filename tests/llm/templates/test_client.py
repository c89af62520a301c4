"""The worker process is kept, ends with its client, and survives what happens to it."""

import os
import signal
import time

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.resources.host import process_cpu_s
from meshnode.llm.model import Message, Tool, ToolChoice
from meshnode.llm.templates import client
from meshnode.llm.templates.client import TemplateWorker
from meshnode.llm.templates.model import MESSAGES_MAX, TEMPLATE_CHARS_MAX, TOOLS_MAX, TemplateSource

SOURCE = TemplateSource(
    template="{% for m in messages %}{{ m.content }}{% endfor %}{% for t in tools or [] %}{{ t.function.name }}"
    "{% endfor %}"
)
HI = (Message(role="user", content="Hi \u00e9"),)


@pytest.fixture
async def worker():
    made = TemplateWorker(clock_wall=time.time, cpu_s=process_cpu_s)
    yield made
    await made.aclose()


async def test_prompts_come_from_one_process(worker):
    assert (await worker.render(SOURCE, HI)).text == "Hi \u00e9"
    first = worker._process.pid
    assert (await worker.render(SOURCE, HI * 2)).text == "Hi \u00e9Hi \u00e9"
    assert worker._process.pid == first


async def test_many_callers_take_turns(worker):
    made = {}

    async def ask(number):
        made[number] = (await worker.render(SOURCE, [Message(role="user", content=str(number))])).text

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(ask, number)
    assert made == {number: str(number) for number in range(20)}


async def test_a_process_that_others_kept_from_running_is_waited_for(worker, monkeypatch):
    """By the clock its template would be hostile, and the model refused to everybody for a minute.

    Nor is it to blame for what the process had of a processor for the templates before it.
    """
    monkeypatch.setattr(worker, "_cpu_s", lambda pid: 100.0 + process_cpu_s(pid))
    await worker.render(SOURCE, HI)
    pid = worker._process.pid
    os.kill(pid, signal.SIGSTOP)
    async with trio.open_nursery() as nursery:

        async def wake():
            await trio.sleep(client.RENDER_S_MAX + 0.5)
            os.kill(pid, signal.SIGCONT)

        nursery.start_soon(wake)
        assert (await worker.render(SOURCE, HI)).text == "Hi \u00e9"
    assert worker._process.pid == pid


async def test_a_process_that_never_runs_blames_the_machine(worker, monkeypatch):
    monkeypatch.setattr(client, "STARVED_S_MAX", client.RENDER_S_MAX + 0.5)
    await worker.render(SOURCE, HI)
    os.kill(worker._process.pid, signal.SIGSTOP)
    with pytest.raises(MeshError) as busy:
        await worker.render(SOURCE, HI)
    assert (busy.value.code, busy.value.retryable) == (ErrorCode.UNAVAILABLE, True)
    assert (await worker.render(SOURCE, HI)).text == "Hi \u00e9"


async def test_a_killed_process_is_replaced(worker):
    await worker.render(SOURCE, HI)
    os.kill(worker._process.pid, signal.SIGKILL)
    await worker._process.wait()
    assert (await worker.render(SOURCE, HI)).text == "Hi \u00e9"


async def test_a_template_that_refuses_one_conversation_is_there_for_the_next(worker):
    picky = TemplateSource(template="{% if messages[0].content == 'x' %}{{ raise_exception('no') }}{% endif %}ok")
    with pytest.raises(MeshError, match="refuses this conversation: no"):
        await worker.render(picky, [Message(role="user", content="x")])
    assert (await worker.render(picky, HI)).text == "ok"


async def test_a_caller_who_leaves_spoils_nothing(worker):
    await worker.render(SOURCE, HI)
    with trio.CancelScope() as scope:
        scope.cancel()
        await worker.render(SOURCE, HI)
    assert (await worker.render(SOURCE, HI)).text == "Hi \u00e9"


async def test_the_process_ends_with_its_client():
    worker = TemplateWorker(clock_wall=time.time, cpu_s=process_cpu_s)
    await worker.render(SOURCE, HI)
    process = worker._process
    await worker.aclose()
    assert process.returncode == -signal.SIGKILL


async def test_the_process_ends_when_its_agent_is_gone():
    worker = TemplateWorker(clock_wall=time.time, cpu_s=process_cpu_s)
    await worker.render(SOURCE, HI)
    await worker._process.stdin.aclose()
    with trio.fail_after(10):
        assert await worker._process.wait() == 0
    await worker.aclose()


async def test_tools_are_hidden_when_none_may_be_called(worker):
    tools = (Tool(name="add"),)
    assert (await worker.render(SOURCE, HI, tools)).text == "Hi \u00e9add"
    assert (await worker.render(SOURCE, HI, tools, ToolChoice(mode="none"))).text == "Hi \u00e9"


async def test_the_environment_of_the_agent_stays_with_the_agent(worker, monkeypatch):
    monkeypatch.setenv("MESHNODE_SECRET", "s3cret")
    await worker.render(SOURCE, HI)
    with open(f"/proc/{worker._process.pid}/environ", "rb") as environment:  # noqa: ASYNC230 - procfs does not block
        assert b"s3cret" not in environment.read()


async def test_what_is_imported_late_is_there(worker):
    template = "{{ '\\u00e9\\N{EURO SIGN}' }}{{ 'a b' | wordwrap(1) }}{{ lipsum(n=1) | length > 0 }}"
    template += "{{ strftime_now('%B %j') | length > 4 }}"
    assert (await worker.render(TemplateSource(template=template), HI)).text == "\u00e9\u20aca\nbTrueTrue"


@pytest.mark.parametrize(
    ("source", "messages", "tools", "words"),
    [
        (SOURCE, HI, [Tool(name=f"t{i}") for i in range(10_000)], f"at most {TOOLS_MAX}"),
        (SOURCE, HI * (MESSAGES_MAX + 1), (), f"at most {MESSAGES_MAX}"),
        (TemplateSource(template="x" * (TEMPLATE_CHARS_MAX + 1)), HI, (), str(TEMPLATE_CHARS_MAX)),
        (SOURCE, [Message(role="user", content="x" * 17_000_000)], (), "characters"),
        (SOURCE, [Message(role="user", content="\ud800")], (), "written down"),
        (TemplateSource(template="{{ raise_exception('no') }}"), HI, (), "refuses this conversation: no"),
        (TemplateSource(template="{{ '\\ud800' }}"), HI, (), "surrogate"),
    ],
    ids=["tools", "messages", "template", "bytes", "surrogate in", "refused", "surrogate out"],
)
async def test_what_has_no_measure_is_refused_and_the_next_is_served(worker, source, messages, tools, words):
    with pytest.raises(MeshError) as refused:
        await worker.render(source, messages, tools)
    assert refused.value.code is ErrorCode.BAD_REQUEST
    assert words in refused.value.message
    assert (await worker.render(SOURCE, HI)).text == "Hi \u00e9"
