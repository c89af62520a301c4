"""Stored conversations."""

from datetime import datetime
from typing import Any, Final

from meshnode.api.routing import ApiRequest, Reply, Route
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import ChatSession
from meshnode.llm.routes.needs import Chats
from meshnode.llm.routes.schema import NewChat, NewMessage, NewTitle
from meshnode.llm.routes.translate import page_of

TAG: Final = "llm"
MESSAGE_BODY_BYTES_MAX: Final = 8 * 1024 * 1024
"""A message of the largest size, with every character escaped."""

Request = ApiRequest[Any, Any]


class ChatRoutes:
    """Handlers."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats

    async def chats(self, request: Request) -> Reply:
        page, cursor = page_of(self._chats.list(), lambda chat: chat.id, request.limit, request.cursor)
        return Reply(page, next_cursor=cursor)

    async def create(self, request: Request) -> ChatSession:
        return await self._chats.create(request.body.model)

    async def read(self, request: Request) -> ChatSession:
        return self._chats.read(request.params["id"])

    async def delete(self, request: Request) -> None:
        await self._chats.delete(request.params["id"])

    async def rename(self, request: Request) -> None:
        await self._chats.rename(request.params["id"], request.body.title)

    async def append(self, request: Request) -> None:
        body: NewMessage = request.body
        sent = None if body.sent_at is None else _unix_s(body.sent_at)
        await self._chats.append(request.params["id"], body.role, body.content, sent)

    def routes(self) -> list[Route]:
        """All of them."""
        known = (ErrorCode.NOT_FOUND,)
        return [
            Route(
                method="GET", path="/api/llm/sessions", summary="Stored chats without messages, the last used first.",
                handler=self.chats, response=list[ChatSession], paginated=True, tag=TAG,
            ),
            Route(
                method="POST", path="/api/llm/sessions", summary="Begin a chat.",
                handler=self.create, request=NewChat, response=ChatSession, errors=(ErrorCode.CONFLICT,), tag=TAG,
            ),
            Route(
                method="GET", path="/api/llm/sessions/{id}", summary="A chat with all messages.",
                handler=self.read, response=ChatSession, errors=known, tag=TAG,
            ),
            Route(
                method="DELETE", path="/api/llm/sessions/{id}", summary="Delete a chat, whether it is there or not.",
                handler=self.delete, status=204, errors=known, tag=TAG,
            ),
            Route(
                method="PUT", path="/api/llm/sessions/{id}/title", summary="Give a chat a title.",
                handler=self.rename, request=NewTitle, status=204, errors=known, tag=TAG,
            ),
            Route(
                method="POST", path="/api/llm/sessions/{id}/messages", summary="Add a message to a chat.",
                handler=self.append, request=NewMessage, status=204, body_bytes_max=MESSAGE_BODY_BYTES_MAX,
                errors=(ErrorCode.NOT_FOUND, ErrorCode.TOO_LARGE, ErrorCode.CONFLICT), tag=TAG,
            ),
        ]  # fmt: skip


def _unix_s(stamp: str) -> float:
    """Unix seconds of an RFC 3339 time. Raises MeshError BAD_REQUEST."""
    try:
        moment = datetime.fromisoformat(stamp)
        if moment.tzinfo is not None:
            return moment.timestamp()
    except (ValueError, OverflowError):
        pass
    raise MeshError(
        ErrorCode.BAD_REQUEST,
        "`sent_at` is no RFC 3339 time, such as 2027-01-15T08:00:00Z. Leave it out for now.",
        detail={"field": "sent_at"},
    )
