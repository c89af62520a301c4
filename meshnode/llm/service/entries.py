"""This node as an entry: its frame streams to the stages that its sessions use, and which frame is whose.

One stream to a node for each pipeline, opened when it is first needed, shared by all sessions. What a session makes
of its frames is the session's.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger
from meshnode.llm.service.calls import PULSE_S, Attach, Calls, StreamSink, attend
from meshnode.llm.service.host import StageHost
from meshnode.llm.service.hosts import Hosts
from protocol.ids import NodeId
from protocol.sharding.frames import (
    TO_ENTRY,
    Accepted,
    Embedding,
    Frame,
    FrameError,
    Message,
    Pieces,
    Refused,
    StageError,
    decode,
)
from protocol.sharding.pipelines import Pipeline
from protocol.sharding.steps import FrameDecoder

FRAME_BYTES_MAX: Final = 2 * 1024 * 1024
IDLE_S: Final = 120.0

Heard = Callable[[NodeId, Message], None]
Lost = Callable[[NodeId, str], None]
Alive = Callable[[NodeId], None]


class _Session:
    __slots__ = ("alive", "heard", "lost")

    def __init__(self, heard: Heard, lost: Lost, alive: Alive) -> None:
        self.heard = heard
        self.lost = lost
        self.alive = alive


class EntryLink:
    """The stream to one stage of one pipeline. `users` are the sessions that must hear if it breaks."""

    def __init__(self, node: NodeId, pipeline: bytes) -> None:
        self.node = node
        self.pipeline = pipeline
        self.users: set[bytes] = set()
        self.ready = trio.Event()
        self.failure: MeshError | None = None
        self.send: Callable[[bytes], object] | None = None
        self.scope = trio.CancelScope()
        self.idle_since: float | None = None


class Entries:
    """All streams and sessions of this entry."""

    def __init__(self, *, calls: Calls, hosts: Hosts, log: Logger) -> None:
        self._calls = calls
        self._hosts = hosts
        self._log = log
        self._links: dict[tuple[NodeId, bytes], EntryLink] = {}
        self._sessions: dict[bytes, _Session] = {}
        self._nursery: trio.Nursery | None = None

    @property
    def sessions(self) -> int:
        """How many tries of sessions are open."""
        return len(self._sessions)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await trio.sleep(IDLE_S / 4)
                for link in list(self._links.values()):
                    idle = link.idle_since is not None and trio.current_time() - link.idle_since > IDLE_S
                    if idle and not link.users:
                        link.scope.cancel()

    def register(self, session: bytes, heard: Heard, lost: Lost, alive: Alive = lambda node: None) -> None:
        """Frames of this session go to `heard` from now on; `alive` is told whenever an agent of it shows life."""
        self._sessions[session] = _Session(heard, lost, alive)

    def forget(self, session: bytes) -> None:
        """The session is over; late frames of it fall away."""
        self._sessions.pop(session, None)
        for link in self._links.values():
            link.users.discard(session)
            if not link.users and link.idle_since is None:
                link.idle_since = trio.current_time()

    async def open(self, pipeline: Pipeline, session: bytes, frame: bytes) -> None:
        """Connect with the first and the last stage, and send the OPEN frame. Raises MeshError with detail node_id."""
        first, last = pipeline.first, pipeline.last
        # The answer may come before this returns, so the way back stands first.
        for node in dict.fromkeys((last, first)):
            link = self._link(node, pipeline.id)
            link.users.add(session)
            link.idle_since = None
            await link.ready.wait()
            if link.failure is not None:
                raise link.failure
        await self._send(self._link(first, pipeline.id), frame)

    async def send(self, node: NodeId, pipeline: bytes, frame: bytes) -> None:
        """Send to a stage that is connected already; without a stream there is nobody to tell."""
        link = self._links.get((node, pipeline))
        if link is not None and link.ready.is_set() and link.failure is None:
            await self._send(link, frame)

    async def _send(self, link: EntryLink, frame: bytes) -> None:
        send = link.send
        if send is None:
            raise _lost(link.node, "the stream is gone")
        await send(frame)  # type: ignore[misc]  # both kinds of sinks are coroutines

    def drop(self, node: NodeId) -> None:
        """This node did what no honest one does: cut its streams."""
        for link in list(self._links.values()):
            if link.node == node:
                link.scope.cancel()

    def _link(self, node: NodeId, pipeline: bytes) -> EntryLink:
        link = self._links.get((node, pipeline))
        if link is None:
            if self._nursery is None:
                raise MeshError(ErrorCode.UNAVAILABLE, "This agent is starting or stopping.", retryable=True)
            link = self._links[node, pipeline] = EntryLink(node, pipeline)
            self._nursery.start_soon(self._serve, link)
        return link

    async def _serve(self, link: EntryLink) -> None:
        words = "the stream ended"
        try:
            with link.scope:
                if link.node == self._calls.me:
                    await self._serve_here(link)
                else:
                    words = await self._serve_there(link)
        except MeshError as error:
            words = error.message
        self._links.pop((link.node, link.pipeline), None)
        link.failure = link.failure or _lost(link.node, words)
        link.send = None
        link.ready.set()
        for session in list(link.users):
            known = self._sessions.get(session)
            if known is not None:
                known.lost(link.node, words)

    async def _serve_there(self, link: EntryLink) -> str:
        async def take(frame: Frame) -> None:
            self._heard(link.node, frame)

        async with self._calls.stream(link.node, "llm.attach", Attach(link.pipeline, "entry")) as stream:
            sink = StreamSink(stream)
            link.send = sink.send
            link.ready.set()
            return await attend(
                stream, take, bytes_max=lambda: FRAME_BYTES_MAX, send=sink.send, pulsed=lambda: self._pulsed(link)
            )

    def _pulsed(self, link: EntryLink) -> None:
        for session in link.users:
            known = self._sessions.get(session)
            if known is not None:
                known.alive(link.node)

    async def _serve_here(self, link: EntryLink) -> None:
        host = self._hosts.stages.get(link.pipeline)
        if not isinstance(host, StageHost):
            raise _lost(link.node, "this node holds no stage of that pipeline")
        await host.until_loaded()
        decoder = FrameDecoder(bytes_max=FRAME_BYTES_MAX)

        def deliver(data: bytes) -> None:
            decoder.feed(data)
            while (frame := decoder.next_frame()) is not None:
                self._heard(link.node, frame)

        entry = host.attach_own(deliver)

        async def send(data: bytes) -> None:
            way = FrameDecoder(bytes_max=len(data))
            way.feed(data)
            frame = way.next_frame()
            assert frame is not None  # frames of this node are whole
            await host.take_from_entry(frame, link.node)

        try:
            link.send = send
            link.ready.set()
            while not entry.ended.is_set():
                # This very agent watches over that engine.
                self._pulsed(link)
                with trio.move_on_after(PULSE_S):
                    await entry.ended.wait()
        finally:
            await host.detach_own(entry)

    def _heard(self, node: NodeId, frame: Frame) -> None:
        """Hand a frame to its session. Raises MeshError if no stage sends such a thing."""
        try:
            if frame.kind not in TO_ENTRY:
                raise FrameError(f"kind {frame.kind} is not for an entry")
            message = decode(frame)
        except FrameError as error:
            raise MeshError(ErrorCode.PROTOCOL_VIOLATION, f"Node {node} sent nonsense: {error}.") from error
        assert isinstance(message, Accepted | Refused | Pieces | Embedding | StageError)  # what the kinds allow
        known = self._sessions.get(message.session or b"")
        if known is not None:
            known.heard(node, message)

    @asynccontextmanager
    async def raw(self, session: bytes) -> AsyncIterator[trio.MemoryReceiveChannel[Message | MeshError]]:
        """A session without a machine: its messages as they come, and a MeshError when a stream is lost."""
        send, receive = trio.open_memory_channel[Message | MeshError](1024)

        def heard(node: NodeId, message: Message) -> None:
            try:
                send.send_nowait(message)
            except trio.WouldBlock:
                self.drop(node)

        def lost(node: NodeId, words: str) -> None:
            try:
                send.send_nowait(_lost(node, words))
            except trio.WouldBlock:
                send.close()

        self.register(session, heard, lost)
        try:
            yield receive
        finally:
            self.forget(session)


def _lost(node: NodeId, words: str) -> MeshError:
    return MeshError(
        ErrorCode.UNREACHABLE,
        f"The stream to node {node} is lost: {words}.",
        retryable=True,
        detail={"node_id": node},
    )
