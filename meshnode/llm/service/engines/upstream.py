"""Servers that speak OpenAI's protocol and that this node can reach: vLLM, llama-server, Ollama, another mesh.

What one node reaches, every node can use: the others send their requests here over a link. Keys stay on this node.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import httpx2
import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.core.openai_client import StreamReader, body_of, error_words
from meshnode.llm.model import Embedded, EmbeddingRequest, GenerationEvent, GenerationRequest, ModelCard

SILENCE_MAX_S: Final = 120.0
CONNECT_MAX_S: Final = 5.0
ERROR_BYTES_MAX: Final = 65_536
LIST_BYTES_MAX: Final = 4 * 1024 * 1024
VECTORS_BYTES_MAX: Final = 256 * 1024 * 1024
MODELS_MAX: Final = 2_000


@dataclass(frozen=True, slots=True)
class Upstream:
    """One server. `url` ends before /chat/completions, and mostly in /v1."""

    name: str
    url: str
    key: str = ""


class _Listed(msgspec.Struct):
    id: str
    created: int = 0


class _Listing(msgspec.Struct):
    data: list[_Listed] = []


class _Vector(msgspec.Struct):
    index: int
    embedding: list[float]


class _EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int = 0


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
        self._found: dict[str, tuple[Upstream, str]] = {}
        self.failures: Mapping[str, str] = {}

    @property
    def configured(self) -> bool:
        """Whether there is any."""
        return bool(self._servers)

    async def refresh(self) -> list[ModelCard]:
        """Ask every server what it has; one that does not answer has nothing, and why is in `failures`."""
        found: dict[str, tuple[Upstream, str]] = {}
        failures: dict[str, str] = {}
        cards: list[ModelCard] = []

        async def ask(server: Upstream) -> None:
            try:
                listed = await self._list(server)
            except MeshError as error:
                failures[server.name] = error.message
                return
            for entry in listed[:MODELS_MAX]:
                name = f"{server.name}/{entry.id}"
                found[name] = (server, entry.id)
                cards.append(
                    ModelCard(name=name, aliases=(entry.id,), source=f"upstream {server.name}", created=entry.created)
                )

        async with trio.open_nursery() as nursery:
            for server in self._servers.values():
                nursery.start_soon(ask, server)
        self._found, self.failures = found, failures
        return sorted(cards, key=lambda card: card.name)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Ask and pass on. Raises MeshError NOT_FOUND, BAD_REQUEST, UNREACHABLE, UNAVAILABLE."""
        server, model = self._server_of(request.model)
        reader = StreamReader(f"The upstream server {server.name}")
        response = await self._post(server, "chat/completions", body_of(request, model))
        try:
            async with aclosing(_pieces(server, response)) as pieces:
                async for data in pieces:
                    for event in reader.feed(data):
                        yield event
                    if reader.ended:
                        return
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
        response = await self._post(server, "embeddings", body)
        try:
            data = await _read(server, response, VECTORS_BYTES_MAX)
            answer = msgspec.json.decode(data, type=_Embeddings, strict=False)
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise _unreachable(server, error) from error
        finally:
            await _close(response)
        vectors = [tuple(entry.embedding) for entry in sorted(answer.data, key=lambda entry: entry.index)]
        return Embedded(model=request.model, vectors=tuple(vectors), prompt_tokens=answer.usage.prompt_tokens)

    def _server_of(self, name: str) -> tuple[Upstream, str]:
        found = self._found.get(name)
        if found is None:
            raise MeshError(
                ErrorCode.NOT_FOUND, f"No upstream server of this node has {name!r} now. `meshnode models` lists them."
            )
        return found

    async def _list(self, server: Upstream) -> list[_Listed]:
        request = self._client.build_request(
            "GET", f"{server.url}/models", headers=_headers(server), timeout=httpx2.Timeout(CONNECT_MAX_S)
        )
        response = await self._send(server, request)
        try:
            return msgspec.json.decode(await _read(server, response, LIST_BYTES_MAX), type=_Listing, strict=False).data
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise _unreachable(server, error) from error
        finally:
            await _close(response)

    async def _post(self, server: Upstream, path: str, body: Mapping[str, object]) -> httpx2.Response:
        patience = httpx2.Timeout(SILENCE_MAX_S, connect=CONNECT_MAX_S)
        return await self._send(
            server,
            self._client.build_request(
                "POST", f"{server.url}/{path}", json=dict(body), headers=_headers(server), timeout=patience
            ),
        )

    async def _send(self, server: Upstream, request: httpx2.Request) -> httpx2.Response:
        """The answer, its body still to be read. Raises MeshError unless it is a success."""
        try:
            response = await self._client.send(request, stream=True)
        except httpx2.TransportError as error:
            raise _unreachable(server, error) from error
        status = response.status_code
        if status == 200:
            return response
        try:
            words = error_words(status, await _read(server, response, ERROR_BYTES_MAX))
        finally:
            await _close(response)
        hint = " Is its key in llm.upstream_keys right?" if status in (401, 403) else ""
        raise MeshError(
            ErrorCode.BAD_REQUEST if status in (400, 413, 422) else ErrorCode.UNAVAILABLE,
            f"The upstream server {server.name} refused ({words}).{hint}",
            retryable=status in (429, 502, 503, 504),
        )


async def _pieces(server: Upstream, response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """The body in pieces. Raises MeshError UNREACHABLE when the connection breaks."""
    stream = response.aiter_bytes()
    try:
        async for data in stream:
            yield data
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        raise _unreachable(server, error) from error
    finally:
        # The client's generators lie one in another and end only when they run into an end.
        with trio.CancelScope() as over:
            over.cancel()
            async for _ in stream:
                pass


async def _read(server: Upstream, response: httpx2.Response, bytes_max: int) -> bytes:
    """The whole body. Raises MeshError UNAVAILABLE if it is longer than that."""
    read = bytearray()
    async for piece in _pieces(server, response):
        read += piece
        if len(read) > bytes_max:
            raise MeshError(
                ErrorCode.UNAVAILABLE, f"The upstream server {server.name} sent more than {bytes_max} bytes."
            )
    return bytes(read)


async def _close(response: httpx2.Response) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(1.0):
        await response.aclose()


def _headers(server: Upstream) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.key}"} if server.key else {}


def _unreachable(server: Upstream, error: Exception) -> MeshError:
    why = str(error) or type(error).__name__
    return MeshError(
        ErrorCode.UNREACHABLE,
        f"The upstream server {server.name} at {server.url} does not answer: {why}.",
        retryable=True,
    )
