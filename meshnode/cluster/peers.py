"""What the cluster answers to peers: pings, admissions, farewells, the root key, a copied identity."""

from collections.abc import Mapping
from typing import Any

from meshnode.cluster.service.pings import Echo, Pings
from meshnode.cluster.service.trust import AdmitAnswer, AdmitRequest, Done, LostVoter, RootOffer, Trust
from meshnode.cluster.service.twins import Copied, Heard, Twins
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.contracts import PeerMethod
from protocol.ids import NodeId, node_id_bytes


def peer_methods(trust: Trust, pings: Pings, twins: Twins) -> Mapping[str, PeerMethod[Any]]:
    """The methods by name."""

    async def ping(peer: NodeId, echo: Echo) -> Echo:
        return await pings.answer(echo)

    async def admit(peer: NodeId, request: AdmitRequest) -> AdmitAnswer:
        return await trust.admit_for(peer, request)

    async def leave(peer: NodeId, request: Done) -> Done:
        return await trust.leave_for(peer)

    async def bury(peer: NodeId, offer: RootOffer) -> Done:
        return await trust.bury_for(peer, offer.sealed)

    async def take_root(peer: NodeId, offer: RootOffer) -> Done:
        return await trust.take_root(peer, offer)

    async def forget(peer: NodeId, lost: LostVoter) -> Done:
        try:
            node_id_bytes(NodeId(lost.node))
        except ValueError as error:
            raise MeshError(ErrorCode.BAD_REQUEST, "That is not a node id.") from error
        return await trust.forget_for(peer, lost)

    async def copied(peer: NodeId, told: Copied) -> Heard:
        twins.copied(told)
        return Heard()

    return {
        "cluster.copied": PeerMethod(Copied, copied),
        "cluster.forget": PeerMethod(LostVoter, forget),
        "cluster.ping": PeerMethod(Echo, ping),
        "cluster.admit": PeerMethod(AdmitRequest, admit),
        "cluster.leave": PeerMethod(Done, leave),
        "cluster.bury": PeerMethod(RootOffer, bury),
        "cluster.take_root": PeerMethod(RootOffer, take_root),
    }
