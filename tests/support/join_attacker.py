"""Those who should not get in: a guesser, an impostor, and a machine in the middle.

They speak the real protocol with the real messages, and keep every byte that a victim sent them.
"""

import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from meshnode.cluster.service.onboarding.certificates import issuer_context, joiner_context
from meshnode.cluster.service.onboarding.frames import JoinFrames
from meshnode.kernel.errors import MeshError
from meshnode.kernel.identity import NodeIdentity, make_csr
from protocol.ids import node_id_of
from protocol.trust.join import (
    JOIN_FRAME_BYTES_MAX,
    Begin,
    Claim,
    Granted,
    Offer,
    Refused,
    Terms,
    Transcript,
    decode_from_issuer,
    encode_frame,
    verifier_of,
)
from protocol.trust.join_url import JoinUrl

NONCE = b"\x07" * 32


async def guess(
    url: JoinUrl,
    secret: bytes,
    me: NodeIdentity,
    root_key: bytes,
    issuer_key: bytes,
    speaks: tuple[int, int] = (0, 0),
) -> str:
    """One attempt with a guessed secret by a client that skips every check of its own: "granted", a refusal's code, or
    "closed" if the port would not talk."""
    try:
        socket = await trio.open_tcp_stream(url.host, url.port)
    except OSError:
        return "closed"
    stream = trio.SSLStream(socket, joiner_context(), https_compatible=True)
    try:
        frames = JoinFrames(stream, frame_bytes_max=JOIN_FRAME_BYTES_MAX)
        assert isinstance(decode_from_issuer(await frames.receive()), Offer)
        await frames.send(Begin(1, url.token_id, me.public_key, NONCE, *speaks))
        terms = decode_from_issuer(await frames.receive())
        if isinstance(terms, Refused):
            return terms.code
        assert isinstance(terms, Terms)
        transcript = Transcript(url.token_id, terms.role, me.public_key, issuer_key, root_key, NONCE, terms.nonce)
        await frames.send(Claim(make_csr(me), "guesser", transcript.joiner_proof(verifier_of(secret))))
        answer = decode_from_issuer(await frames.receive())
        if isinstance(answer, Refused):
            return answer.code
        assert isinstance(answer, Granted)
        return "granted"
    except (MeshError, trio.BrokenResourceError):
        return "closed"
    finally:
        await trio.aclose_forcefully(stream)


class Impostor:
    """Answers at an address of its own with the certificates it was given, and keeps what it hears.

    With `relay_to` it puts itself between: the victim's words go to the real issuer over a second connection, and the
    answers back, with the issuer's Offer replaced by its own.
    """

    def __init__(
        self, identity: NodeIdentity, leaf: bytes, root_certificate: bytes, *, relay_to: int | None = None
    ) -> None:
        self.node_id = node_id_of(identity.public_key)
        self.offer = Offer(1, 1, root_certificate, leaf)
        self.terms: Terms | None = None  # what it answers to Begin when it does not relay
        self.heard = b""
        self.overheard = b""  # what the real issuer answered through it
        self._relay_to = relay_to
        self._context: ssl.SSLContext = issuer_context(identity, leaf)

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[int, None]:
        """Yields the port."""
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(lambda task_status: self._listen(task_status))
            yield int(listeners[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()

    async def _listen(self, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        await trio.serve_tcp(self._serve, 0, host="127.0.0.1", task_status=task_status)

    async def _serve(self, socket: trio.SocketStream) -> None:
        tls = trio.SSLStream(socket, self._context, server_side=True, https_compatible=True)
        try:
            await tls.send_all(encode_frame(self.offer))
            if self._relay_to is None:
                await self._listen_on(tls)
            else:
                await self._relay(tls)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            # The victim hung up: what it said until then is kept.
            pass

    async def _listen_on(self, tls: trio.SSLStream[trio.SocketStream]) -> None:
        self.heard += await tls.receive_some(65536)
        if self.heard and self.terms is not None:
            await tls.send_all(encode_frame(self.terms))
            self.heard += await tls.receive_some(65536)

    async def _relay(self, victim: trio.SSLStream[trio.SocketStream]) -> None:
        assert self._relay_to is not None
        socket = await trio.open_tcp_stream("127.0.0.1", self._relay_to)
        issuer = trio.SSLStream(socket, joiner_context(), https_compatible=True)
        try:
            offer = await JoinFrames(issuer, frame_bytes_max=JOIN_FRAME_BYTES_MAX).receive()
            assert isinstance(decode_from_issuer(offer), Offer)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answer, issuer, victim)
                while received := await victim.receive_some(65536):
                    self.heard += received
                    await issuer.send_all(received)
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(issuer)

    async def _answer(
        self, issuer: trio.SSLStream[trio.SocketStream], victim: trio.SSLStream[trio.SocketStream]
    ) -> None:
        while received := await issuer.receive_some(65536):
            self.overheard += received
            await victim.send_all(received)


class Wiretap:
    """Passes bytes between a victim and the real issuer and keeps all of them: it can read, and does nothing else."""

    def __init__(self, relay_to: int) -> None:
        self.seen = b""
        self._relay_to = relay_to

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[int, None]:
        """Yields the port."""
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(lambda task_status: self._listen(task_status))
            yield int(listeners[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()

    async def _listen(self, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        await trio.serve_tcp(self._serve, 0, host="127.0.0.1", task_status=task_status)

    async def _serve(self, victim: trio.SocketStream) -> None:
        issuer = await trio.open_tcp_stream("127.0.0.1", self._relay_to)
        async with issuer, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, issuer, victim)
            await self._pass(victim, issuer)

    async def _pass(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        try:
            async for received in source:
                self.seen += received
                await target.send_all(received)
            await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # Either end hung up.
            return
