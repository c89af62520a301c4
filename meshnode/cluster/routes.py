"""The cluster's native HTTP: parse, one verb, return. Paths and names are those that clients of the API know."""

from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any, Final

import msgspec

from meshnode.api.routing import ApiRequest, Content, Reply, Route
from meshnode.api.sse import BusNames, EventStream
from meshnode.cluster.model import (
    CoordinatorMoved,
    InvitationLine,
    InvitationUsed,
    Invited,
    Joining,
    MeshPolicy,
    NodeEvicted,
    NodeInfo,
    NodeJoined,
    NodeLeft,
    NodeOffline,
    NodeSuspect,
    NodeUpdated,
    PingReport,
    Role,
    Summary,
)
from meshnode.cluster.service.invites import Invites
from meshnode.cluster.service.moves import Moves
from meshnode.cluster.service.names import Names
from meshnode.cluster.service.nodes import Nodes
from meshnode.cluster.service.pings import COUNT_MAX, Pings
from meshnode.cluster.service.trust import Trust
from meshnode.kernel.errors import ErrorCode, MeshError

TAG: Final = "cluster"

BUS_EVENTS: Final[BusNames] = {
    NodeJoined: ("node_joined", lambda event: event.node),
    NodeUpdated: ("node_updated", lambda event: event.node),
    NodeSuspect: ("node_suspect", lambda event: event.node),
    NodeOffline: ("node_offline", lambda event: event.node),
    NodeLeft: ("node_left", lambda event: event.node),
    NodeEvicted: ("node_evicted", lambda event: event),
    CoordinatorMoved: ("coordinator_changed", lambda event: event),
    InvitationUsed: ("invitation_used", lambda event: event),
}

Request = ApiRequest[Any, Any]


class EvictQuery(msgspec.Struct, frozen=True):
    """`lost`: the machine is gone for good; its vote is not waited for."""

    lost: bool = False


class PingBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many round trips, and how long to pause between them."""

    count: Annotated[int, msgspec.Meta(ge=1, le=COUNT_MAX)] = 10
    interval_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.0


class RenameBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The new name."""

    name: str


class InviteBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For whom, and for how long."""

    role: Role = "member"
    ttl_s: float | None = None  # within the limits of meshnode.cluster.model; the verb names them


class InviteQuery(msgspec.Struct, frozen=True):
    """The same, for the GET that clients know."""

    role: Role = "member"
    ttl_s: float | None = None  # within the limits of meshnode.cluster.model; the verb names them


class JoinBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A join URL. `coordinator_ip` and `token` are what other clients send; a whole URL is accepted as the token."""

    url: str = ""
    leave_first: bool = False
    coordinator_ip: str = ""
    token: str = ""


class LeaveBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`force`: leave even if nobody can be told, or if no admin remains."""

    force: bool = False


class PolicyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to change; what is left out stays as it is."""

    members_may_invite: bool | None = None
    members_may_evict: bool | None = None
    members_may_delete_models: bool | None = None
    gossip_key_rotation_s: float | None = None  # from 60 to 2592000


class Left(msgspec.Struct, frozen=True):
    """The agent leaves its mesh and founds one of its own. `former`: the folder where its former files will be."""

    status: str
    message: str
    former: str


class ClusterRoutes:
    """Handlers. `landing` answers what is below /join/; `events` makes the frames of a stream."""

    def __init__(
        self,
        *,
        nodes: Nodes,
        trust: Trust,
        pings: Pings,
        invites: Invites,
        moves: Moves,
        names: Names,
        landing: Callable[[str], Content],
        events: Callable[[str | None], AsyncGenerator[bytes, None]],
    ) -> None:
        self._nodes = nodes
        self._trust = trust
        self._pings = pings
        self._invites = invites
        self._moves = moves
        self._names = names
        self._landing = landing
        self._events = events

    async def status(self, request: Request) -> Summary:
        return self._nodes.summary()

    async def list_nodes(self, request: Request) -> Reply:
        page, cursor = self._nodes.nodes(limit=request.limit, cursor=request.cursor)
        if request.local_only:
            page, cursor = [node for node in page if node.this_node], None
        return Reply(page, next_cursor=cursor)

    async def node(self, request: Request) -> NodeInfo:
        return self._nodes.node(self._nodes.find(request.params["id"]))

    async def evict(self, request: Request) -> None:
        lost = request.query.lost
        await self._trust.evict(self._nodes.find(request.params["id"], also_evicted=lost), lost=lost)

    async def promote(self, request: Request) -> NodeInfo:
        node = self._nodes.find(request.params["id"])
        await self._trust.promote(node)
        return self._nodes.node(node)

    async def rename(self, request: Request) -> NodeInfo:
        node = self._nodes.find(request.params["id"])
        await self._names.rename(node, request.body.name)
        return self._nodes.node(node)

    async def ping(self, request: Request) -> PingReport:
        node = self._nodes.find(request.params["id"])
        return await self._pings.ping(node, count=request.body.count, interval_s=request.body.interval_s)

    async def invite(self, request: Request) -> Invited:
        return await self._invites.invite(role=request.body.role, ttl_s=request.body.ttl_s)

    async def invite_by_get(self, request: Request) -> Invited:
        return await self._invites.invite(role=request.query.role, ttl_s=request.query.ttl_s)

    async def invitations(self, request: Request) -> list[InvitationLine]:
        return self._invites.invitations()

    async def revoke(self, request: Request) -> None:
        await self._invites.revoke(request.params["token"])

    async def join(self, request: Request) -> Joining:
        body: JoinBody = request.body
        url = body.url or body.token
        if "://" not in url:
            raise MeshError(
                ErrorCode.BAD_REQUEST,
                "A join needs the whole URL that `meshnode invite` printed, http://HOST:4894/join/...#..., as `url`: "
                "a short code alone proves nothing to either side, so it is not accepted.",
            )
        return await self._moves.join(url, leave_first=body.leave_first)

    async def leave(self, request: Request) -> Left:
        former = str(await self._moves.leave(force=request.body.force))
        return Left("success", f"This machine leaves its mesh; its former files are kept in {former}.", former)

    async def policy(self, request: Request) -> MeshPolicy:
        return self._trust.policy

    async def set_policy(self, request: Request) -> MeshPolicy:
        wanted = {key: value for key, value in msgspec.structs.asdict(request.body).items() if value is not None}
        await self._trust.set_policy(wanted)
        return self._trust.policy

    async def landing(self, request: Request) -> Content:
        return self._landing(request.params["token"])

    async def events(self, request: Request) -> EventStream:
        return EventStream(self._events(request.header("last-event-id")), flush_s=0.01)

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route(
                method="GET", path="/api/status", summary="The mesh in one answer: sums, coordinator, peers, warnings.",
                handler=self.status, response=Summary, mesh_wide=True, tag=TAG,
            ),
            Route(
                method="GET", path="/api/nodes", summary="Every member, online or not, the newest first.",
                handler=self.list_nodes, response=list[NodeInfo], paginated=True, mesh_wide=True, tag=TAG,
            ),
            Route(
                method="GET", path="/api/nodes/{id}", summary="One member, by id, name or beginning of its id.",
                handler=self.node, response=NodeInfo, errors=(ErrorCode.UNKNOWN_NODE, ErrorCode.CONFLICT), tag=TAG,
            ),
            Route(
                method="DELETE", path="/api/nodes/{id}", summary="Evict a member for good. Admins only.",
                handler=self.evict, query=EvictQuery, status=204,
                errors=(ErrorCode.UNKNOWN_NODE, ErrorCode.NOT_ADMIN, ErrorCode.CONFLICT), tag=TAG,
            ),
            Route(
                method="PATCH", path="/api/nodes/{id}", summary="Rename the node that is asked; no other.",
                handler=self.rename, request=RenameBody, response=NodeInfo,
                errors=(ErrorCode.UNKNOWN_NODE, ErrorCode.FORBIDDEN), tag=TAG,
            ),
            Route(
                method="POST", path="/api/nodes/{id}/promote", summary="Make a member an admin. Admins only.",
                handler=self.promote, response=NodeInfo, errors=(ErrorCode.UNKNOWN_NODE, ErrorCode.NOT_ADMIN), tag=TAG,
            ),
            Route(
                method="POST", path="/api/nodes/{id}/ping", summary="Round trips over the control link.",
                handler=self.ping, request=PingBody, response=PingReport,
                errors=(ErrorCode.UNKNOWN_NODE, ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT), tag=TAG,
            ),
            Route(
                method="POST", path="/api/cluster/join-token", summary="A one-time invitation.",
                handler=self.invite, request=InviteBody, response=Invited, errors=(ErrorCode.FORBIDDEN,), tag=TAG,
            ),
            Route(
                method="GET", path="/api/cluster/join-token", summary="The same, for clients that know it as a GET.",
                handler=self.invite_by_get, query=InviteQuery, response=Invited, get_changes=True,
                errors=(ErrorCode.FORBIDDEN,), tag=TAG,
            ),
            Route(
                method="GET", path="/api/cluster/invitations", summary="Invitations made on this node, newest first.",
                handler=self.invitations, response=list[InvitationLine], tag=TAG,
            ),
            Route(
                method="DELETE", path="/api/cluster/invitations/{token}", summary="Revoke an invitation.",
                handler=self.revoke, status=204, errors=(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT), tag=TAG,
            ),
            Route(
                method="POST", path="/api/cluster/join", summary="Join the mesh of a join URL with this machine.",
                handler=self.join, request=JoinBody, response=Joining, errors=(ErrorCode.ALREADY_MEMBER,), tag=TAG,
            ),
            Route(
                method="POST", path="/api/cluster/join-remote", summary="The same, under the name clients know.",
                handler=self.join, request=JoinBody, response=Joining, errors=(ErrorCode.ALREADY_MEMBER,), tag=TAG,
            ),
            Route(
                method="POST", path="/api/cluster/leave", summary="Leave the mesh with this machine.",
                handler=self.leave, request=LeaveBody, response=Left, errors=(ErrorCode.CONFLICT,), tag=TAG,
            ),
            Route(
                method="GET", path="/api/cluster/policy", summary="The settings of the mesh, the same on all members.",
                handler=self.policy, response=MeshPolicy, tag=TAG,
            ),
            Route(
                method="PUT", path="/api/cluster/policy", summary="Change settings of the mesh. Admins only.",
                handler=self.set_policy, request=PolicyBody, response=MeshPolicy,
                errors=(ErrorCode.NOT_ADMIN,), tag=TAG,
            ),
            Route(
                method="GET", path="/join/{token...}", summary="The page that tells an invited person what to do.",
                handler=self.landing, media=("text/html",), public=True, tag=TAG,
            ),
            Route(
                method="GET", path="/api/events", summary="What happens in the mesh, as server-sent events.",
                handler=self.events, streams=True, tag=TAG,
                events={
                    "node_joined": NodeInfo, "node_updated": NodeInfo, "node_suspect": NodeInfo,
                    "node_offline": NodeInfo, "node_left": NodeInfo, "node_evicted": NodeEvicted,
                    "coordinator_changed": CoordinatorMoved, "invitation_used": InvitationUsed,
                },
            ),
        ]  # fmt: skip
