"""A large mesh that has found itself already: every node has everybody up, though none was told one by one.

A join of 10,000 nodes is 100 million news of peers, hours of computing before anything of interest happens. Here each
machine is given the tables that these news would have left, all but one entry; that one comes as a real frame, so that
everything that hangs on a peer that comes up is set going by the machines themselves. Nothing is decided here, and
tests compare the tables with those of a mesh that joined.
"""

from collections.abc import KeysView, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec

from protocol.effects import FrameReceived
from protocol.ids import NodeId
from protocol.membership.state import MACHINE as MEMBERSHIP
from protocol.node import Node
from protocol.wire.messages import ViewReply
from protocol.wire.statements import Stated
from simulations.computer import Computer
from simulations.overlay import Overlay

if TYPE_CHECKING:
    from simulations.world import World

K = TypeVar("K")
V = TypeVar("V")


class _Everybody:
    """What all nodes know of all: the shared half of every table."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        roster = nodes[0].roster
        own = [node.membership.view.known[node.me] for node in nodes]
        self.known: Mapping[NodeId, Stated] = {stated.signer: stated for stated in own}
        self.ids = list(self.known)
        self.names: Mapping[NodeId, None] = dict.fromkeys(self.ids)
        self.boots: Mapping[NodeId, int] = {node.me: node.boot for node in nodes}
        self.shorts: Mapping[NodeId, bytes] = {node_id: roster.short(node_id) for node_id in self.ids}
        self.order = sorted(self.ids, key=roster.short)
        self.place = {node_id: place for place, node_id in enumerate(self.order)}
        self.durable = {stated.signer.encode("ascii"): stated.blob for stated in own}
        self.digest = 0
        for stated in own:
            self.digest ^= stated.token


def start_settled(world: "World", computers: Sequence[Computer]) -> None:
    """Start these members, all there are and three at least, with full views. They need one roster in common."""
    for computer in computers:
        computer.start()
    nodes = [cast(Node, computer.machine) for computer in computers]
    everybody = _Everybody(nodes)
    for number, (computer, node) in enumerate(zip(computers, nodes, strict=True)):
        missing = nodes[number - 1].me
        _fill(node, everybody, missing)
        computer.disk.remembered[MEMBERSHIP] = everybody.durable
    world.tell_settled(computers)
    for number, computer in enumerate(computers):
        missing = nodes[number - 1].me
        frame = msgspec.msgpack.encode(ViewReply([everybody.known[missing].blob], []))
        computer.input(FrameReceived(missing, frame))


def _fill(node: Node, everybody: _Everybody, missing: NodeId) -> None:
    """The tables as they are once all but `missing` came up."""
    me = node.me
    others = [node_id for node_id in everybody.ids if node_id != me and node_id != missing]
    view = node.membership.view
    view.known = _without(everybody.known, missing)
    view._up = _without(everybody.names, missing)
    view.up = KeysView(view._up)
    view.peers = others
    view.digest = everybody.digest ^ everybody.known[missing].token
    order = list(everybody.order)
    del order[everybody.place[missing]]
    node.heartbeats._order = order
    node.keyring._up = _without(everybody.names, me, missing)
    node.records._up = _without(everybody.names, me, missing)
    node.datagrams._boots = _without(everybody.boots, me, missing)
    contest = node.election._contest
    candidates, place = contest._candidates, everybody.place
    candidates.up = _without(everybody.shorts, me, missing)
    candidates.better = len(place) - 1 - place[me] - (place[missing] > place[me])
    candidates._first = None
    contest._up = contest.following._up = candidates.up


def _without(base: Mapping[K, V], *missing: K) -> dict[K, V]:
    overlay = Overlay(base)
    for key in missing:
        del overlay[key]
    return cast("dict[K, V]", overlay)  # it behaves as one, and costs what differs
