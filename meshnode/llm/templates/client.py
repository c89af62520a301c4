"""The agent's side of the template worker: one process, kept, killed when a template takes too long, started again.

Templates come with models, and models from strangers. So none runs in the agent: the worker has limits (worker.py),
and this side keeps the time.
"""

import hashlib
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import Message, Tool, ToolChoice
from meshnode.llm.templates.forcing import check_tools
from meshnode.llm.templates.model import (
    LENGTH,
    MESSAGES_MAX,
    PROMPT_CHARS_MAX,
    REQUEST_BYTES_MAX,
    TEMPLATE_CHARS_MAX,
    Refusal,
    RenderedPrompt,
    RenderRequest,
    TemplateSource,
)

RENDER_S_MAX: Final = 2.0
PROCESSOR_SHARE: Final = 0.9  # of RENDER_S_MAX, had of a processor, is the template's fault
STARVED_S_MAX: Final = 20.0
LOOK_S: Final = 0.1
START_S_MAX: Final = 20.0
REPLY_BYTES_MAX: Final = 4 * PROMPT_CHARS_MAX + 4096
HOSTILE_KEPT_MAX: Final = 64
HOSTILE_S: Final = 60.0  # for so long a template that broke a limit is not tried again
BLAMED_BYTES_MAX: Final = 64 * 1024
BLAMED_MESSAGES_MAX: Final = 64
"""With more than this it may be the conversation that is too much: nobody else is to lose the model for it."""

_READ_BYTES: Final = 256 * 1024
_ENVIRONMENT_KEPT: Final = ("HOME", "LANG", "LC_ALL", "PYTHONHOME", "PYTHONPATH", "TZ", "VIRTUAL_ENV")

_Reply = RenderedPrompt | Refusal


class TemplateWorker:
    """Renders chat templates, one at a time. No process runs before the first use; `aclose` ends it."""

    def __init__(self, *, clock_wall: Callable[[], float], cpu_s: Callable[[int], float]) -> None:
        """`cpu_s`: the seconds of CPUs that a process had; infinite when it is gone."""
        self._clock_wall = clock_wall
        self._cpu_s = cpu_s
        self._process: trio.Process | None = None
        self._turn = trio.Lock()
        self._hostile: OrderedDict[bytes, float] = OrderedDict()  # digest of a template -> when it may be tried again
        self._decoder: msgspec.msgpack.Decoder[_Reply] = msgspec.msgpack.Decoder(_Reply)

    async def render(
        self,
        source: TemplateSource,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice | None = None,
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """The prompt for these messages. With `tool_choice` none the tools are not shown to the model.

        Raises: MeshError: BAD_REQUEST when the template refuses the conversation or breaks a limit, or a limit of
        ours is broken. UNAVAILABLE when the worker gets no processor.
        """
        check_tools(tools)
        shown = () if tool_choice is not None and tool_choice.mode == "none" else tuple(tools)
        if len(messages) > MESSAGES_MAX:
            raise MeshError(
                ErrorCode.BAD_REQUEST, f"{len(messages)} messages were sent; at most {MESSAGES_MAX} are taken."
            )
        length = sum(len(message.content) for message in messages)
        if length > PROMPT_CHARS_MAX:
            raise _too_long(f"The messages have {length} characters, more than any context here takes.")
        text = (source.tool_template if shown else None) or source.template or ""
        if len(text) > TEMPLATE_CHARS_MAX:
            raise _refused(f"it has {len(text)} characters, and {TEMPLATE_CHARS_MAX} are the limit")
        request = RenderRequest(
            source=source,
            messages=tuple(messages),
            tools=shown,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=dict(template_kwargs or {}),
            now=self._clock_wall(),
        )
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        body = _encoded(request)
        async with self._turn:
            if self._hostile.get(digest, 0.0) > trio.current_time():
                raise _refused("it broke the limits of time or memory a moment ago")
            answer = await self._exchange(body)
            if isinstance(answer, RenderedPrompt):
                return answer
            said_bytes = len(body) - len(text.encode(errors="surrogatepass"))
            if answer.hostile and said_bytes <= BLAMED_BYTES_MAX and len(messages) <= BLAMED_MESSAGES_MAX:
                self._remember(digest)
            raise _refused(answer.words)

    async def aclose(self) -> None:
        """Ends the process."""
        async with self._turn:
            await self._end()

    async def _exchange(self, body: bytes) -> _Reply:
        answer: _Reply | None = None
        is_broken = False
        try:
            process = await self._running()
            overtime = _Overtime(lambda: self._cpu_s(process.pid))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(overtime.watch, nursery.cancel_scope)
                try:
                    await _stdin(process).send_all(LENGTH.pack(len(body)) + body)
                    answer = self._decoder.decode(await _frame(process))
                except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError, msgspec.MsgspecError):
                    is_broken = True
                nursery.cancel_scope.cancel()
            if answer is not None:
                return answer
            if is_broken:
                return Refusal(words="the template ended the process that it ran in", hostile=True)
            if overtime.is_starved:
                raise MeshError(
                    ErrorCode.UNAVAILABLE,
                    f"This node is too busy to write the prompt: the model's template got hardly any processor for "
                    f"{STARVED_S_MAX:g} s. Try again, or ask another node.",
                    retryable=True,
                )
            return Refusal(words=f"the template takes longer than {RENDER_S_MAX:g} s", hostile=True)
        finally:
            # After a failure or a cancelled caller the pipes are out of step: the next request gets a new process.
            if answer is None:
                await self._end()

    async def _running(self) -> trio.Process:
        if self._process is None or self._process.returncode is not None:
            await self._end()
            environment = {key: os.environ[key] for key in _ENVIRONMENT_KEPT if key in os.environ}
            self._process = await trio.lowlevel.open_process(
                [sys.executable, "-P", "-m", "meshnode.llm.templates"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            try:
                with trio.fail_after(START_S_MAX):
                    await _frame(self._process)
            except (trio.TooSlowError, EOFError) as error:
                raise MeshError(
                    ErrorCode.UNAVAILABLE,
                    "The process for chat templates does not start; run `python -m meshnode.llm.templates` to see why.",
                    retryable=True,
                ) from error
        return self._process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await _stdin(process).aclose()
            await _stdout(process).aclose()

    def _remember(self, digest: bytes) -> None:
        self._hostile[digest] = trio.current_time() + HOSTILE_S
        self._hostile.move_to_end(digest)
        while len(self._hostile) > HOSTILE_KEPT_MAX:
            self._hostile.popitem(last=False)


class _Overtime:
    """Cancels a scope when the template had its time of a processor.

    By the clock alone a good template would be taken for a hostile one where others have the cores. Nothing in a
    template can wait, so one that gets no processor for long, which `is_starved` then says, is not to blame.
    """

    def __init__(self, cpu_s: Callable[[], float]) -> None:
        self._cpu_s = cpu_s
        self.is_starved = False

    async def watch(self, scope: trio.CancelScope) -> None:
        """Until the scope is cancelled, by this or by others."""
        began_s, spent_s = trio.current_time(), self._cpu_s()
        await trio.sleep(RENDER_S_MAX)
        while not self.is_starved and self._cpu_s() - spent_s < RENDER_S_MAX * PROCESSOR_SHARE:
            await trio.sleep(LOOK_S)
            self.is_starved = trio.current_time() > began_s + STARVED_S_MAX
        scope.cancel()


def _encoded(request: RenderRequest) -> bytes:
    try:
        body = msgspec.msgpack.encode(request)
    except (UnicodeEncodeError, OverflowError, RecursionError, TypeError) as error:
        raise MeshError(ErrorCode.BAD_REQUEST, f"The messages cannot be written down: {str(error)[:200]}.") from error
    if len(body) > REQUEST_BYTES_MAX:
        raise _too_long(f"Messages, tools and template have {len(body)} bytes; at most {REQUEST_BYTES_MAX} are taken.")
    return body


async def _frame(process: trio.Process) -> bytes:
    received, wanted = bytearray(), LENGTH.size
    length: int | None = None
    while len(received) < wanted or length is None:
        if length is None and len(received) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received)
            if length > REPLY_BYTES_MAX:
                raise EOFError
            wanted = LENGTH.size + length
            continue
        more = await _stdout(process).receive_some(_READ_BYTES)
        if not more:
            raise EOFError
        received += more
    return bytes(received[LENGTH.size :])


def _stdin(process: trio.Process) -> trio.abc.SendStream:
    assert process.stdin is not None, "the process was opened with pipes"
    return process.stdin


def _stdout(process: trio.Process) -> trio.abc.ReceiveStream:
    assert process.stdout is not None, "the process was opened with pipes"
    return process.stdout


def _too_long(words: str) -> MeshError:
    return MeshError(
        ErrorCode.BAD_REQUEST,
        f"{words} Shorten the conversation.",
        detail={"openai_code": "context_length_exceeded", "param": "messages"},
    )


def _refused(words: str) -> MeshError:
    return MeshError(
        ErrorCode.BAD_REQUEST,
        f"The model's chat template is of no use here: {words}. Use another model, or send a plain prompt to "
        f"/v1/completions.",
    )
