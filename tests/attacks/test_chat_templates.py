"""Case 36, templates: a hostile one gets no time, no memory, no way out, and the next prompt is written as ever."""

import resource
import time

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.resources.host import process_cpu_s
from meshnode.llm.model import Message
from meshnode.llm.templates import client
from meshnode.llm.templates.client import RENDER_S_MAX, START_S_MAX, TemplateWorker
from meshnode.llm.templates.model import PROMPT_CHARS_MAX, TemplateSource
from meshnode.llm.templates.worker import MEMORY_BYTES_MAX

HANGS_S = 60.0
HI = (Message(role="user", content="Hi"),)
GOOD = TemplateSource(template="{% for m in messages %}{{ m.content }}{% endfor %}")

HOSTILE = {
    # Time.
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "loop over itself": "{% set ns = namespace(l=[1]) %}{% for a in range(99999) %}"
    "{% set ns.l = ns.l + ns.l[:9] %}{% for b in ns.l %}{% endfor %}{% endfor %}",
    "search": "{{ ('a' * 9999999 + 'b').split('a' * 4999999 + 'c') | length }}{% for i in range(99999) %}"
    "{{ ('a' * 9999999).count('ab') }}{% endfor %}",
    # Memory and output.
    "range": "{{ range(10 ** 9) | list }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "power of a string": "{{ ('9' * 5) | int ** ('9' * 5) | int }}",
    "repetition": "{{ 'a' * 10000000000 }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
    "{{ ns.s }}",
    "padding": "{{ '{:>9999999999}'.format('a') }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "center": "{{ 'a' | center(9999999999) }}",
    "filling": "{{ 'a'.ljust(9999999999) }}",
    "indent": "{{ ('a\\n' * 999999) | indent(99999) }}",
    "prompt without end": "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "clock": "{{ strftime_now('%Y' * 99999999) }}",
    # Recursion and depth.
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "depth": "{{ " + "(" * 20000 + ")" * 20000 + " }}",
    "depth of lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "depth of blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    # Ways out (CVE-2026-5760, CVE-2024-34359 and their kin).
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "joiner": "{{ joiner.__init__.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('id') }}",
    "namespace": "{{ namespace.__init__.__globals__.os }}{{ namespace.__init__.__globals__.os.environ }}",
    "our function": "{{ raise_exception.__globals__ }}"
    "{{ raise_exception.__globals__.json.codecs.open('/etc/passwd').read() }}",
    "closure": "{{ strftime_now.__closure__[0].cell_contents }}{{ strftime_now.__closure__[0].x.y }}",
    "format": "{{ '{0.__class__.__mro__}'.format('').x.y }}",
    "format map": "{{ '{x.__class__}'.format_map({'x': 1}).x.y }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).mro() }}",
    "map": "{{ ['']|map(attribute='__class__')|first }}{{ (['']|map(attribute='__class__')|first).mro() }}",
    "mutation": "{{ messages.append(1) }}",
    "generator": "{% set g = (messages|map('upper')) %}{{ g.gi_frame.f_globals }}{{ g.gi_frame.f_globals.x }}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "code of a macro": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}{{ f._func.__code__.co_consts }}",
}  # fmt: skip


def spent_s() -> float:
    """Seconds of a processor that the processes had which this one started and reaped."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture
async def worker():
    made = TemplateWorker(clock_wall=time.time, cpu_s=process_cpu_s)
    yield made
    await made.aclose()


@pytest.mark.parametrize("template", HOSTILE.values(), ids=list(HOSTILE))
async def test_case_36_a_hostile_template_is_refused_and_the_next_prompt_written(worker, template):
    await worker.render(GOOD, HI)
    # A worker that never answers is killed: it comes back at all, and what the process had of a processor until it was
    # reaped is bounded. The clock says less where other tests have the cores.
    begun = spent_s()
    with trio.fail_after(HANGS_S), pytest.raises(MeshError) as refused:
        await worker.render(TemplateSource(template=template), HI)
    assert spent_s() - begun < RENDER_S_MAX + 3
    assert refused.value.code is ErrorCode.BAD_REQUEST
    assert "root:" not in refused.value.message
    assert "uid=" not in refused.value.message
    with trio.fail_after(START_S_MAX):
        assert (await worker.render(GOOD, HI)).text == "Hi"


async def test_case_36_a_template_that_broke_a_limit_costs_its_time_once(worker):
    with pytest.raises(MeshError, match="longer than"):
        await worker.render(TemplateSource(template=HOSTILE["loop"]), HI)
    begun = spent_s()
    with pytest.raises(MeshError, match="a moment ago"):
        await worker.render(TemplateSource(template=HOSTILE["loop"]), HI)
    assert worker._process is None, "the process that was killed was not started again for it"
    assert spent_s() == begun


TOO_MUCH = {
    "BLAMED_MESSAGES_MAX": ("messages", HI * 400),
    "BLAMED_BYTES_MAX": ("messages[0].content", [Message(role="user", content="x" * (client.BLAMED_BYTES_MAX + 1))]),
}


@pytest.mark.parametrize("defended", [True, False])
@pytest.mark.parametrize("bound", TOO_MUCH)
async def test_case_36_a_conversation_that_is_too_much_takes_the_model_from_nobody(
    worker, monkeypatch, bound, defended
):
    """Whoever sends it is refused; the template is a good one, and others go on using it. Each bound holds alone."""
    if not defended:
        monkeypatch.setattr(client, bound, 1 << 40)
    what, conversation = TOO_MUCH[bound]
    loops = "".join(f"{{% for {name} in {what} %}}" for name in "abcd")
    slow = TemplateSource(template=f"{loops}{'{% endfor %}' * 4}user")
    with pytest.raises(MeshError, match=r"longer than|without end"):
        await worker.render(slow, conversation)
    if defended:
        assert (await worker.render(slow, HI)).text == "user"
    else:
        with pytest.raises(MeshError, match="a moment ago"):
            await worker.render(slow, HI)


async def test_case_36_a_conversation_longer_than_any_prompt_is_told_so(worker):
    with pytest.raises(MeshError, match="Shorten the conversation") as refused:
        await worker.render(GOOD, [Message(role="user", content="x" * (PROMPT_CHARS_MAX + 1))])
    assert refused.value.detail["openai_code"] == "context_length_exceeded"
    assert (await worker.render(GOOD, HI)).text == "Hi"


async def test_case_36_what_the_messages_say_is_never_a_template(worker):
    said = "{{ 7 * 7 }}{% for x in range(99999) %}{% endfor %}"
    assert (await worker.render(GOOD, [Message(role="user", content=said)])).text == said


async def test_case_36_the_worker_has_given_up_what_it_does_not_need(worker):
    await worker.render(GOOD, HI)
    limits = {}
    with open(f"/proc/{worker._process.pid}/limits") as told:  # noqa: ASYNC230 - procfs does not block
        for line in told.read().splitlines()[1:]:
            limits[line[:25].strip()] = line[25:].split()[:2]
    assert limits["Max address space"] == [str(MEMORY_BYTES_MAX)] * 2
    assert limits["Max open files"] == ["3", "3"]
    assert limits["Max file size"] == ["0", "0"]
    assert limits["Max core file size"] == ["0", "0"]
