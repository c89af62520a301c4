"""Servers that speak OpenAI's protocol and that this node can reach: vLLM, llama-server, Ollama, another mesh.

What one node reaches, every node can use: the others send their requests here over a link. Keys stay on this node.
"""

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Final
from urllib.parse import urlsplit

import httpx2
import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.core.openai_client import StreamReader, body_of, error_words, without
from meshnode.llm.model import (
    HOPS_HEADER,
    UNREADABLE,
    Embedded,
    EmbeddingRequest,
    GenerationEvent,
    GenerationRequest,
    ModelCard,
)

SILENCE_MAX_S: Final = 120.0
WORDLESS_MAX_S: Final = 900.0
"""Bytes come, but no answer begins in them, or none goes on: as long as the longest prompt may take."""

CONNECT_MAX_S: Final = 5.0
LIST_MAX_S: Final = 30.0
ERROR_BYTES_MAX: Final = 65_536
LIST_BYTES_MAX: Final = 4 * 1024 * 1024
VECTORS_BYTES_MAX: Final = 64 * 1024 * 1024
VECTOR_WIDTH_MAX: Final = 65_536
FLOAT_MAX: Final = 3.4e38
"""Vectors leave here as 32-bit numbers."""

MODELS_MAX: Final = 2_000
MODEL_CHARS_MAX: Final = 200
HOPS_MAX: Final = 3
"""So many meshes may ask one another for one answer: more go round in a circle."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """One server. `url` ends before /chat/completions, and mostly in /v1."""

    name: str
    url: str
    key: str = ""


class _Listed(msgspec.Struct):
    id: str
    created: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0


class _Listing(msgspec.Struct):
    data: list[_Listed] = []


class _Vector(msgspec.Struct):
    index: int
    embedding: Annotated[list[float], msgspec.Meta(min_length=1, max_length=VECTOR_WIDTH_MAX)]


class _EmbeddingUsage(msgspec.Struct):
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0


class _Embeddings(msgspec.Struct):
    data: list[_Vector]
    usage: _EmbeddingUsage = msgspec.field(default_factory=_EmbeddingUsage)


def parse_upstreams(urls: Sequence[str], keys: Sequence[str]) -> tuple[Upstream, ...]:
    """The settings llm.upstreams and llm.upstream_keys, each NAME=VALUE. Raises MeshError BAD_SETTING."""
    by_name = dict(_pair("llm.upstreams", text) for text in urls)
    secrets = dict(_pair("llm.upstream_keys", text) for text in keys)
    for name in secrets:
        if name not in by_name:
            raise MeshError(ErrorCode.BAD_SETTING, f"llm.upstream_keys names {name!r}, which is not in llm.upstreams.")
    for name, url in by_name.items():
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise MeshError(ErrorCode.BAD_SETTING, f"llm.upstreams: {name} needs a URL like http://host:8000/v1.")
    return tuple(Upstream(name, url.rstrip("/"), secrets.get(name, "")) for name, url in by_name.items())


def _pair(setting: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise MeshError(ErrorCode.BAD_SETTING, f"Each entry of {setting} is NAME=VALUE.")
    return name, value


class Upstreams:
    """All servers of this node. A model is called SERVER/MODEL."""

    def __init__(self, servers: Sequence[Upstream], client: httpx2.AsyncClient) -> None:
        self._servers = {server.name: server for server in servers}
        self._client = client
        self._listed: dict[str, list[_Listed]] = {}
        self._found: dict[str, tuple[Upstream, str]] = {}
        self.failures: Mapping[str, str] = {}

    async def refresh(self, *, silent_only: bool = False) -> list[ModelCard]:
        """Ask every server, or those in `failures`, what it has; one that does not answer has nothing, and is there."""
        failures: dict[str, str] = {}

        async def ask(server: Upstream) -> None:
            try:
                self._listed[server.name] = await self._list(server)
            except MeshError as error:
                self._listed.pop(server.name, None)
                failures[server.name] = error.message

        async with trio.open_nursery() as nursery:
            for name, server in self._servers.items():
                if not silent_only or name in self.failures:
                    nursery.start_soon(ask, server)
        self.failures = failures
        return self._cards()

    def _cards(self) -> list[ModelCard]:
        """Of what the servers listed; from now on these models are found."""
        self._found = {}
        cards: list[ModelCard] = []
        for server in self._servers.values():
            for entry in self._listed.get(server.name, ())[:MODELS_MAX]:
                if not _is_name(entry.id) or entry.id.startswith(f"{server.name}/"):
                    continue  # it leads back here, or nowhere
                name = f"{server.name}/{entry.id}"
                self._found[name] = (server, entry.id)
                cards.append(
                    ModelCard(name=name, aliases=(entry.id,), source=f"upstream {server.name}", created=entry.created)
                )
        return sorted(cards, key=lambda card: card.name)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Ask and pass on. Raises MeshError NOT_FOUND, BAD_REQUEST, UNREACHABLE, UNAVAILABLE."""
        server, model = self._server_of(request.model)
        reader = StreamReader(f"The upstream server {server.name}", server.key)
        response = await self._post(server, "chat/completions", body_of(request, model), request.hops)
        try:
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "text/event-stream":
                raise _odd(server, f"it answered with {kind[:100]!r} where a stream was asked for")
            said_at = trio.current_time()
            async with aclosing(_pieces(server, response)) as pieces:
                async for data in pieces:
                    for event in reader.feed(data):
                        said_at = trio.current_time()
                        yield event
                    if reader.ended:
                        return
                    if trio.current_time() - said_at > WORDLESS_MAX_S:
                        raise _odd(server, f"it sent bytes for {WORDLESS_MAX_S:g} s, and no word in them")
            for event in reader.close():
                yield event
        finally:
            await _close(response)

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        """Vectors from the server. Raises MeshError as `generate`."""
        server, model = self._server_of(request.model)
        inputs = [text if isinstance(text, str) else list(text) for text in request.inputs]
        body: dict[str, object] = {"model": model, "input": inputs}
        if request.dimensions is not None:
            body["dimensions"] = request.dimensions
        response = await self._post(server, "embeddings", body, request.hops)
        try:
            data = await _read(server, response, VECTORS_BYTES_MAX)
            answer = msgspec.json.decode(data, type=_Embeddings, strict=False)
        except UNREADABLE as error:
            raise _odd(server, f"it sent what is no list of vectors ({str(error)[:200]})") from error
        finally:
            await _close(response)
        entries = sorted(answer.data, key=lambda entry: entry.index)
        if [entry.index for entry in entries] != list(range(len(inputs))):
            raise _odd(server, f"it sent {len(entries)} vectors for {len(inputs)} texts")
        if any(abs(value) > FLOAT_MAX for entry in entries for value in entry.embedding):
            raise _odd(server, "its vectors have numbers that are too large")
        vectors = tuple(tuple(entry.embedding) for entry in entries)
        return Embedded(model=request.model, vectors=vectors, prompt_tokens=answer.usage.prompt_tokens)

    def _server_of(self, name: str) -> tuple[Upstream, str]:
        found = self._found.get(name)
        if found is None:
            raise MeshError(
                ErrorCode.NOT_FOUND, f"No upstream server of this node has {name!r} now. `meshnode models` lists them."
            )
        return found

    async def _list(self, server: Upstream) -> list[_Listed]:
        with trio.move_on_after(LIST_MAX_S):
            request = self._client.build_request(
                "GET", f"{server.url}/models", headers=_headers(server, 1), timeout=httpx2.Timeout(CONNECT_MAX_S)
            )
            response = await self._send(server, request)
            try:
                data = await _read(server, response, LIST_BYTES_MAX)
                return msgspec.json.decode(data, type=_Listing, strict=False).data
            except UNREADABLE as error:
                raise _odd(server, f"it sent what is no list of models ({str(error)[:200]})") from error
            finally:
                await _close(response)
        raise _odd(server, f"it did not say what models it has within {LIST_MAX_S:g} s")

    async def _post(self, server: Upstream, path: str, body: Mapping[str, object], hops: int) -> httpx2.Response:
        if hops >= HOPS_MAX:
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                f"This request came here through {hops} other meshes; {HOPS_MAX} is the limit. Does llm.upstreams of "
                "one of them lead back to itself? Ask the mesh that has the model.",
            )
        patience = httpx2.Timeout(SILENCE_MAX_S, connect=CONNECT_MAX_S)
        url, headers = f"{server.url}/{path}", _headers(server, hops + 1)
        request = self._client.build_request("POST", url, json=dict(body), headers=headers, timeout=patience)
        with trio.move_on_after(WORDLESS_MAX_S):
            return await self._send(server, request)
        raise _odd(server, f"no answer began within {WORDLESS_MAX_S:g} s")

    async def _send(self, server: Upstream, request: httpx2.Request) -> httpx2.Response:
        """The answer, its body still to be read. Raises MeshError unless it is a success."""
        try:
            response = await self._client.send(request, stream=True, follow_redirects=False)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise _unreachable(server, error) from error
        good = False
        try:
            await self._judge(server, response)
            good = True
        finally:
            if not good:
                await _close(response)
        return response

    async def _judge(self, server: Upstream, response: httpx2.Response) -> None:
        status = response.status_code
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            # A few bytes may stand for gigabytes; nobody was asked to compress.
            raise _odd(server, "its answer is compressed, though it was asked not to")
        if status == 200:
            return
        if 300 <= status < 400:
            raise _odd(
                server,
                "it sends whoever asks on to another address, which is not followed: write that address into "
                "llm.upstreams if you trust it",
            )
        words = without(error_words(status, await _read(server, response, ERROR_BYTES_MAX)), server.key)
        hint = " Is its key in llm.upstream_keys right?" if status in (401, 403) else ""
        raise MeshError(
            ErrorCode.BAD_REQUEST if status in (400, 413, 422) else ErrorCode.UNAVAILABLE,
            f"The upstream server {server.name} refused ({words}).{hint}",
            retryable=status in (429, 502, 503, 504),
        )


async def _pieces(server: Upstream, response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """The body in pieces. Raises MeshError UNREACHABLE when the connection breaks."""
    stream = response.aiter_raw()
    try:
        async for data in stream:
            yield data
    except (httpx2.TransportError, httpx2.StreamError) as error:
        raise _unreachable(server, error) from error
    finally:
        # The client's generators lie one in another and end only when they run into an end.
        with trio.CancelScope() as over:
            over.cancel()
            with contextlib.suppress(httpx2.TransportError, httpx2.StreamError):
                async for _ in stream:
                    pass


async def _read(server: Upstream, response: httpx2.Response, bytes_max: int) -> bytes:
    """The whole body. Raises MeshError UNAVAILABLE if it is longer than that."""
    read = bytearray()
    async with aclosing(_pieces(server, response)) as pieces:
        async for piece in pieces:
            read += piece
            if len(read) > bytes_max:
                raise MeshError(
                    ErrorCode.UNAVAILABLE, f"The upstream server {server.name} sent more than {bytes_max} bytes."
                )
    return bytes(read)


async def _close(response: httpx2.Response) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(1.0):
        await response.aclose()


def _headers(server: Upstream, hops: int) -> dict[str, str]:
    asked = {"Accept-Encoding": "identity", HOPS_HEADER: str(hops)}
    return asked | ({"Authorization": f"Bearer {server.key}"} if server.key else {})


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MODEL_CHARS_MAX and text.isprintable()


def _odd(server: Upstream, why: str) -> MeshError:
    return MeshError(
        ErrorCode.UNAVAILABLE,
        f"The upstream server {server.name} at {server.url} cannot be used: {why}. Does its URL in llm.upstreams end "
        "where /chat/completions begins, mostly in /v1?",
    )


def _unreachable(server: Upstream, error: Exception) -> MeshError:
    why = str(error) or type(error).__name__
    return MeshError(
        ErrorCode.UNREACHABLE,
        f"The upstream server {server.name} at {server.url} does not answer: {why}.",
        retryable=True,
    )
