"""A file at an HTTP origin: how long it is, what it hashes to, and any range of its bytes.

It knows how origins misbehave: redirects to storage elsewhere (which never gets the token), ranges that are ignored,
files that change half-way, refusals that mean "ask for access first". Trying again and resuming are `fetch`'s.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin, urlsplit

import httpx2
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.service.pull.refs import RemoteRef

REDIRECTS_MAX: Final = 5
SILENCE_MAX_S: Final = 30.0
CONNECT_MAX_S: Final = 10.0
FILE_BYTES_MAX: Final = 4 * 1024**4
_SHA256_CHARS: Final = 64


@dataclass(frozen=True, slots=True)
class OriginFacts:
    """One part as its origin describes it. `version` changes when the bytes do; `sha256` in hexadecimal if told."""

    url: str
    size: int
    version: str
    sha256: str | None
    ranges: bool


class HttpOrigin:
    """One part of a remote file. Methods raise MeshError; the retryable ones may work a moment later."""

    def __init__(self, client: httpx2.AsyncClient, ref: RemoteRef, part: int = 0, token: str = "") -> None:
        self._client = client
        self._ref = ref
        self._url = ref.urls[part]
        self._token = token

    async def facts(self) -> OriginFacts:
        """Ask for one byte: unlike HEAD, that is answered truly everywhere."""
        async with self._ask({"Range": "bytes=0-0"}) as (response, hub_says):
            size = _size_of(response)
            if size is None or not 0 < size <= FILE_BYTES_MAX:
                raise self._odd("it does not say how long the file is")
            hash_named = (hub_says.get("x-linked-etag") or "").strip('"')
            known = len(hash_named) == _SHA256_CHARS and all(c in "0123456789abcdef" for c in hash_named)
            etag = response.headers.get("etag") or response.headers.get("last-modified") or ""
            return OriginFacts(
                url=self._url,
                size=size,
                version=hash_named or etag,
                sha256=hash_named if known else None,
                ranges=response.status_code == 206,
            )

    @asynccontextmanager
    async def read(self, start: int, length: int, facts: OriginFacts) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes from `start` on, `length` of them, in pieces.

        Raises MeshError CONFLICT if the file is not the one that `facts` describes any more; UNREACHABLE, retryable,
        when the connection breaks or falls silent for SILENCE_MAX_S.
        """
        wanted = {"Range": f"bytes={start}-{start + length - 1}"} if facts.ranges else {}
        async with self._ask(wanted) as (response, hub_says):
            etag = response.headers.get("etag") or response.headers.get("last-modified") or ""
            version = (hub_says.get("x-linked-etag") or "").strip('"') or etag
            if facts.version and version and version != facts.version:
                raise MeshError(
                    ErrorCode.CONFLICT,
                    f"{self._url} changed while it was downloaded. What is here of the old one is of no use: start the "
                    "pull again.",
                )
            if facts.ranges and _start_of(response) != start:
                raise self._odd("it answered with other bytes than those it was asked for")
            async with aclosing(self._pieces(response, 0 if facts.ranges else start, length)) as pieces:
                yield pieces

    async def _pieces(self, response: httpx2.Response, skip: int, length: int) -> AsyncGenerator[bytes, None]:
        left = length
        stream = response.aiter_raw()
        try:
            async for piece in stream:
                if skip >= len(piece):
                    skip -= len(piece)
                    continue
                wanted = piece[skip : skip + left]
                skip = 0
                left -= len(wanted)
                yield wanted
                if not left:
                    return
        except (httpx2.TransportError, httpx2.StreamError) as error:
            raise self._broken(error) from error
        finally:
            # The client's own generators lie one in another and close only when they run on into an end: a cancelled
            # one is given to them here, or each would be left to the garbage collector.
            with trio.CancelScope() as over:
                over.cancel()
                with contextlib.suppress(httpx2.TransportError, httpx2.StreamError):
                    async for _ in stream:
                        pass
        raise self._broken(f"it ended {left} bytes early")

    @asynccontextmanager
    async def _ask(self, headers: Mapping[str, str]) -> AsyncIterator[tuple[httpx2.Response, Mapping[str, str]]]:
        """The final answer, and the headers of the first one, where the hub tells about the file it points to."""
        url, first = self._url, None
        for _ in range(REDIRECTS_MAX + 1):
            asked = {**headers, "Accept-Encoding": "identity"}
            # The storage behind a redirect belongs to somebody else: the token is for the origin alone.
            if self._token and urlsplit(url).netloc == urlsplit(self._url).netloc:
                asked["Authorization"] = f"Bearer {self._token}"
            patience = httpx2.Timeout(SILENCE_MAX_S, connect=CONNECT_MAX_S)
            request = self._client.build_request("GET", url, headers=asked, timeout=patience)
            try:
                response = await self._client.send(request, stream=True)
            except httpx2.TransportError as error:
                raise self._broken(error) from error
            try:
                first = first or response.headers
                if response.status_code in (301, 302, 303, 307, 308):
                    url = self._follow(url, response.headers.get("location", ""))
                    continue
                self._judge(response)
                yield response, first
                return
            finally:
                await response.aclose()
        raise self._odd(f"it redirected more than {REDIRECTS_MAX} times")

    def _follow(self, url: str, location: str) -> str:
        target = urljoin(url, location)
        if not location or (urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https"):
            raise self._odd("it redirected to somewhere that is not https")
        return target

    def _judge(self, response: httpx2.Response) -> None:
        """Raise what the status means."""
        status = response.status_code
        if status in (200, 206):
            return
        if status in (401, 403):
            where = f" Accept its licence at {self._ref.gated_page}, then set" if self._ref.gated_page else " Set"
            raise MeshError(
                ErrorCode.FORBIDDEN,
                f"{self._url} is not open to everybody ({status}).{where} llm.hub_token to a token that may read it "
                "(`meshnode config --help`), and pull again.",
            )
        if status in (404, 410):
            raise MeshError(
                ErrorCode.NOT_FOUND, f"There is no {self._url} ({status}). Look for the file's exact name and revision."
            )
        if status == 416:
            raise MeshError(ErrorCode.CONFLICT, f"{self._url} is shorter than it was. Start the pull again.")
        retryable = status in (408, 425, 429) or status >= 500
        raise MeshError(
            ErrorCode.UNREACHABLE,
            f"{self._url} answered {status}. " + ("Try again later." if retryable else "Is the address right?"),
            retryable=retryable,
            detail={"status": status, "retry_after": response.headers.get("retry-after", "")},
        )

    def _odd(self, why: str) -> MeshError:
        return MeshError(ErrorCode.UNREACHABLE, f"{self._url} cannot be used: {why}. Pull from another place.")

    def _broken(self, why: object) -> MeshError:
        return MeshError(
            ErrorCode.UNREACHABLE,
            f"{self._url} could not be read: {str(why) or type(why).__name__}. What arrived is kept; pull again.",
            retryable=True,
        )


def _size_of(response: httpx2.Response) -> int | None:
    if response.status_code == 206:
        total = response.headers.get("content-range", "").rpartition("/")[2]
    else:
        total = response.headers.get("content-length", "")
    return int(total) if total.isascii() and total.isdigit() and len(total) <= 18 else None


def _start_of(response: httpx2.Response) -> int | None:
    unit, _, rest = response.headers.get("content-range", "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isascii() and start.isdigit() and len(start) <= 18 else None
