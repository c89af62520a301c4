"""Two machines with one identity (a copied data folder): both people are told, with the other machine's address.

The copy that started last counts. The other learns it from the protocol (protocol.membership.twins). The one that
counts is told by the members to whose doors the other still comes.
"""

from typing import Final

import msgspec
import trio

from meshnode.cluster.service.notices import Notices
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.contracts import LinkContested
from meshnode.kernel.links.links import Links
from meshnode.kernel.logs import Logger
from meshnode.kernel.redaction import printable
from meshnode.kernel.service import Policy
from protocol.effects import LinkLost
from protocol.ids import NodeId
from protocol.membership.events import IdentityFreed, IdentityInUse, IdentityUncontested
from protocol.node import Node

NOTICE: Final = "identity"
CALL_S: Final = 5.0
SAID_CHARS_MAX: Final = 200
WAITING_MAX: Final = 16
TOLD_AGAIN_S: Final = 30.0
NOTICE_S: Final = 120.0  # of the copy that counts, after it was last told
_ADVICE: Final = "Stop one of the two; on the copy run `meshnode leave --force`, which gives it an identity of its own"


class Copied(msgspec.Struct, frozen=True):
    """An older boot of the receiver's own identity came to the sender's door, from this address."""

    boot: int
    address: str


class Heard(msgspec.Struct, frozen=True):
    """Nothing more to say."""


class Twins:
    """Tells of copies of identities, of this node's own and of others'."""

    name: Final = "twins"
    policy: Final = Policy.RESTART

    def __init__(self, *, hub: Node, links: Links, notices: Notices, log: Logger) -> None:
        self._hub = hub
        self._links = links
        self._notices = notices
        self._log = log
        self._told: dict[NodeId, float] = {}
        self._fades_at = float("-inf")
        self._send, self._receive = trio.open_memory_channel[LinkContested](WAITING_MAX)

    def observe(self, event: object) -> None:
        """Events of the protocol and of the links."""
        match event:
            case IdentityInUse(_, addresses):
                self._overruled(f" at {', '.join(map(str, addresses))}")
            case LinkLost(code=ErrorCode.CONFLICT, reason=reason) if NOTICE not in self._notices:
                self._overruled(f" (as a member told: {printable(reason)[:SAID_CHARS_MAX]})")
            case IdentityFreed():
                self._log.warning("the other machine with this node's key is gone; this one comes back")
            case IdentityUncontested():
                self._notices.clear(NOTICE)
            case LinkContested() if event.peer != self._hub.me:
                try:
                    self._send.send_nowait(event)
                except trio.WouldBlock:
                    return

    def _overruled(self, where: str) -> None:
        self._fades_at = float("inf")
        self._say(
            f"another machine{where} runs with a copy of this node's key, and it is the one that the others count. "
            f"{_ADVICE}. When the other one is gone, this one comes back by itself"
        )

    def copied(self, copied: Copied) -> None:
        """A member says so. It is only a warning: nothing else follows from its word."""
        if copied.boot >= self._hub.boot or self._fades_at == float("inf"):
            return
        self._fades_at = trio.current_time() + NOTICE_S
        self._say(
            f"another machine at {printable(copied.address)[:64]} runs with a copy of this node's key; this one is the "
            f"one that the others count. {_ADVICE}"
        )

    def _say(self, text: str) -> None:
        if self._notices.put(NOTICE, text):
            self._log.warning("two machines run with this node's key", what=text)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Tell those whose copies come to this node's door; let the notice fade when nobody tells of one any more."""
        task_status.started()
        while True:
            with trio.move_on_after(TOLD_AGAIN_S):
                await self._tell(await self._receive.receive())
            if trio.current_time() > self._fades_at:
                self._fades_at = float("-inf")
                self._notices.clear(NOTICE)

    async def _tell(self, contested: LinkContested) -> None:
        now = trio.current_time()
        self._told = {peer: at for peer, at in self._told.items() if now < at + TOLD_AGAIN_S}
        if contested.peer in self._told:
            return
        self._told[contested.peer] = now
        self._log.warning(
            "a member's key comes from two machines", node=contested.peer, older_at=str(contested.address)
        )
        copied = Copied(contested.boot, contested.address.host)
        try:
            await self._links.call(contested.peer, "cluster.copied", copied, Heard, timeout_s=CALL_S)
        except MeshError as error:
            self._log.debug("the member with two machines was not told", node=contested.peer, why=error.message)
