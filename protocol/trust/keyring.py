"""The keyring: which gossip keys this node holds, seals with and still accepts, and how keys change hands.

The machine "keys". A new key is accepted for receiving at once, used for sending after a short delay in which it
reaches the others, and the old one is dropped after a grace time, which is short after an eviction. Keys go over links
to members only, from whoever has them to whoever lacks them: pushed by who minted, fetched by who was away. Two keys
minted at once on both sides of a partition are both known soon after it heals, and the one of higher rank wins.

It leaves random bytes to the driver (`RotationDue` is answered with `MintKey`), whom to give the newest key to
protocol.trust.keygiving, whom to ask for a missing one to protocol.trust.keysearch, and what a key protects to
protocol.wire.datagram, whose `GossipKeys` it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from protocol.effects import (
    CancelTimer,
    Effect,
    LinkLost,
    LinkOpened,
    LinkReceived,
    Persist,
    Publish,
    Rng,
    SendLink,
    SetTimer,
    TimerFired,
)
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft, PeerUp
from protocol.trust.events import (
    Coordinating,
    KeyRefused,
    KeysChanged,
    MintKey,
    PolicyChanged,
    RosterChanged,
    RotationDue,
)
from protocol.trust.keygiving import GivingParams, KeyGiving
from protocol.trust.keys import GOSSIP_KEY_BYTES, GossipKey, HeldKey, decode_key, encode_key, key_id_of
from protocol.trust.keysearch import KeySearch, SearchParams
from protocol.trust.policy import ROTATION_MAX_S
from protocol.trust.view import RosterView
from protocol.wire.datagram import UnknownKey
from protocol.wire.messages import KeyGrant, KeyRequest

MACHINE: Final = "keys"
_SWITCH, _RETIRE, _ROTATE, _GRANT, _ASK = "switch", "retire", "rotate", "grant", "ask"


@dataclass(frozen=True, slots=True)
class KeyringParams:
    """Times in seconds. The defaults fit every profile: rotation is rare and nothing waits for it."""

    keys_max: int = 4
    switch_delay_s: float = 2.0
    grace_s: float = 600.0
    grace_after_eviction_s: float = 60.0
    rotate_every_s: float = 86_400.0  # where no record of the mesh says else
    rotate_interval_min_s: float = 10.0
    mint_retry_s: float = 5.0
    grants_taken_max: int = 16  # from one peer in the window: twice what rotations at their closest need
    grants_taken_window_s: float = 60.0
    epoch_ahead_max: int = 1_000_000
    retired_max: int = 32
    giving: GivingParams = field(default_factory=GivingParams)
    search: SearchParams = field(default_factory=SearchParams)


class Keyring:
    """Which gossip keys this node holds. Implements protocol.wire.datagram.GossipKeys."""

    def __init__(
        self,
        *,
        me: NodeId,
        roster: RosterView,
        rng: Rng,
        durable: Mapping[bytes, bytes],
        params: KeyringParams | None = None,
        shown: Callable[[NodeId], bytes | None] = lambda peer: None,
    ) -> None:
        """`durable`: what was persisted, or `durable_keys` of the first keys. Holds no key until `start`.

        `shown`: the gossip key under which a peer's last datagram was sealed, if one came.
        """
        self._me = me
        self._roster = roster
        self._rng = rng
        self._params = params or KeyringParams()
        self._rotate_every_s = self._params.rotate_every_s
        self._durable = durable
        self._held: dict[bytes, HeldKey] = {}
        self._newest: HeldKey | None = None
        self._sending: HeldKey | None = None
        self._learnt_at = 0.0  # when the newest key was learnt, monotonic
        self._retired: dict[bytes, None] = {}  # ids of keys that were dropped, oldest first
        self._up: dict[NodeId, None] = {}  # half the size of a set
        self._coordinating = False
        self._due_published_at = float("-inf")
        self._giving = KeyGiving(self._params.giving, shown)
        self._search = KeySearch(rng, self._params.search)
        self._taken: dict[NodeId, tuple[float, int]] = {}

    # ---- what others read -------------------------------------------------------------------------------------------

    def sending(self) -> tuple[bytes, bytes]:
        """(key id, key) to seal with. Raises LookupError while no key is held, which a started member never is."""
        if self._sending is None:
            raise LookupError("no gossip key is held; found or join a mesh first")
        return self._sending.key_id, self._sending.value.key

    def receiving(self, key_id: bytes) -> bytes | None:
        """The key with this id, if datagrams under it are still accepted."""
        held = self._held.get(key_id)
        return None if held is None else held.value.key

    def keys(self) -> tuple[GossipKey, ...]:
        """All keys held, the highest rank first: what a joiner is given."""
        return tuple(sorted((held.value for held in self._held.values()), key=lambda key: key.rank, reverse=True))

    # ---- the machine ------------------------------------------------------------------------------------------------

    def start(self, now: float, wall: float) -> list[Effect]:
        """Take up what was persisted. The newest key is used at once: its delay was served before the restart."""
        for stored in self._durable.values():
            key = decode_key(stored)
            if key is not None:
                self._held[key.key_id] = HeldKey(key, usable_at=now)
        if not self._held:
            return self._schedule_rotation(now)
        self._newest = max(self._held.values(), key=lambda held: held.value.rank)
        self._giving.renew(self._newest.value.key, None)
        # A clock that was set back makes the key young, never older than it can be: at worst one rotation too many.
        age_s = min(max(wall - self._newest.value.learnt_ms / 1000, 0.0), ROTATION_MAX_S)
        self._learnt_at = now - age_s
        return [*self._settle(now), *self._schedule_rotation(now)]

    def handle(self, event: object, now: float, wall: float) -> list[Effect]:
        """One input, see the classes matched here; anything else is none of the keyring's business."""
        match event:
            case UnknownKey():
                return self._unknown_key(event.sender, event.key_id, now)
            case LinkReceived():
                return self._link_message(event, now, wall)
            case TimerFired():
                return self._timer(event, now)
            case LinkOpened():
                return self._link_opened(event.peer, now)
            case LinkLost():
                return self._link_lost(event.peer, now)
            case PeerUp():
                return self._peer_up(event.peer, now)
            case PeerDown() | PeerLeft():
                self._up.pop(event.peer, None)
                self._giving.down(event.peer)
                return []
            case RosterChanged():
                return self._roster_changed(event, now)
            case Coordinating():
                self._coordinating = event.is_coordinator
                return self._schedule_rotation(now)
            case PolicyChanged():
                self._rotate_every_s = event.policy.gossip_key_rotation_s
                return self._schedule_rotation(now)
            case MintKey():
                return self._mint(event.key, now, wall)
            case _:
                return []

    # ---- keys come and go -------------------------------------------------------------------------------------------

    def _mint(self, key: bytes, now: float, wall: float) -> list[Effect]:
        if len(key) != GOSSIP_KEY_BYTES:
            raise ValueError(f"a gossip key has {GOSSIP_KEY_BYTES} bytes, not {len(key)}")
        if key_id_of(key) in self._held or key_id_of(key) in self._retired:
            return []  # RotationDue comes again and asks for other bytes.
        epoch = 1 if self._newest is None else self._newest.value.epoch + 1
        made = GossipKey(epoch, key, self._roster.short(self._me), int(wall * 1000))
        effects = self._learn(made, None, now)
        self._due_published_at = float("-inf")
        others = [peer for peer in self._up if peer in self._roster]
        others.sort()
        self._rng.shuffle(others)
        self._giving.plan(others, now)
        return [*effects, *self._grant_pending(now), *self._schedule_rotation(now)]

    def _learn(self, key: GossipKey, source: NodeId | None, now: float) -> list[Effect]:
        """Hold a key that was not held; a key that outranks the rest becomes the newest."""
        # Who missed a whole rotation was away: the others use this key already, and nobody needs the old one from here.
        behind = self._newest is None or key.epoch > self._newest.value.epoch + 1
        held = HeldKey(key, usable_at=now if behind else now + self._switch_delay())
        effects: list[Effect] = [Persist(MACHINE, key.key_id, encode_key(key))]
        self._held[key.key_id] = held
        if self._newest is None or key.rank > self._newest.value.rank:
            self._newest = held
            self._learnt_at = now
            self._giving.renew(key.key, source)
        effects += self._settle(now)
        effects.append(self._changed())
        return effects

    def _switch_delay(self) -> float:
        """Long enough for the minter to have reached everybody at its pace."""
        per_second = self._params.giving.per_tick / self._params.giving.tick_s
        return self._params.switch_delay_s + len(self._roster) / per_second

    def _settle(self, now: float) -> list[Effect]:
        """Choose the key to send with, date and drop the old ones, and set the two timers."""
        usable = [held for held in self._held.values() if held.usable_at <= now] or list(self._held.values())
        self._sending = max(usable, key=lambda held: held.value.rank, default=None)
        if self._sending is None:
            return []
        rank = self._sending.value.rank
        for held in self._held.values():
            if held.value.rank < rank:
                grace = self._params.grace_after_eviction_s if held.value.tainted else self._params.grace_s
                held.retire_at = now + grace if held.retire_at is None else min(held.retire_at, now + grace)
        effects = self._drop(now)
        waiting = [held.usable_at for held in self._held.values() if held.usable_at > now]
        retiring = [held.retire_at for held in self._held.values() if held.retire_at is not None]
        effects.append(_timer(_SWITCH, min(waiting, default=None)))
        effects.append(_timer(_RETIRE, min(retiring, default=None)))
        return effects

    def _drop(self, now: float) -> list[Effect]:
        """Drop keys whose grace is over, and the lowest ones beyond keys_max."""
        gone = [held for held in self._held.values() if held.retire_at is not None and held.retire_at <= now]
        kept = sorted((held for held in self._held.values() if held not in gone), key=lambda held: held.value.rank)
        excess = len(kept) - self._params.keys_max
        spare = [held for held in kept if held is not self._sending and held is not self._newest]
        gone += spare[: max(excess, 0)]
        for held in gone:
            del self._held[held.value.key_id]
            self._retired[held.value.key_id] = None
        while len(self._retired) > self._params.retired_max:
            del self._retired[next(iter(self._retired))]
        return [Persist(MACHINE, held.value.key_id, None) for held in gone]

    def _changed(self) -> Publish:
        return Publish(KeysChanged(self.sending()[0], tuple(self._held)))

    # ---- rotation ---------------------------------------------------------------------------------------------------

    def _rotation_due(self) -> tuple[float, str]:
        """When this node, as coordinator, is to ask for a new key, and why."""
        if self._newest is None:
            return float("-inf"), "first"
        if self._newest.value.tainted:
            # Several evictions in a row share a rotation, or keys would be dropped while others still send with them.
            return self._learnt_at + self._params.rotate_interval_min_s, "eviction"
        return self._learnt_at + self._rotate_every_s, "age"

    def _schedule_rotation(self, now: float) -> list[Effect]:
        if not self._coordinating:
            return [CancelTimer((MACHINE, _ROTATE))]
        due, reason = self._rotation_due()
        if due > now:
            return [SetTimer((MACHINE, _ROTATE), due)]
        again = self._due_published_at + self._params.mint_retry_s
        if again > now:
            # Asked for already: two answers would be two rotations.
            return [SetTimer((MACHINE, _ROTATE), again)]
        self._due_published_at = now
        return [Publish(RotationDue(reason)), SetTimer((MACHINE, _ROTATE), now + self._params.mint_retry_s)]

    def _roster_changed(self, event: RosterChanged, now: float) -> list[Effect]:
        if not event.removed:
            return []
        for peer in event.removed:
            self._up.pop(peer, None)
            self._giving.forget(peer)
            self._taken.pop(peer, None)
            self._search.forget(peer)
        effects: list[Effect] = []
        for held in self._held.values():
            if not held.value.tainted:
                held.value = msgspec.structs.replace(held.value, tainted=True)
                effects.append(Persist(MACHINE, held.value.key_id, encode_key(held.value)))
        return [*effects, *self._settle(now), *self._schedule_rotation(now)]

    # ---- giving -----------------------------------------------------------------------------------------------------

    def _peer_up(self, peer: NodeId, now: float) -> list[Effect]:
        self._up[peer] = None
        newest = self._newest
        if newest is None or self._giving.is_holder(peer):
            return []
        # One or two nodes push, not all: a peer that comes up in a mesh of 1,000 must not be dialled by 999.
        if not self._coordinating and newest.value.minted_by != self._roster.short(self._me):
            return []
        due = self._giving.came_up(peer, now, is_coordinating=self._coordinating)
        return [] if due is None else [_timer(_GRANT, due)]

    def _link_opened(self, peer: NodeId, now: float) -> list[Effect]:
        return [] if self._giving.is_holder(peer) else self._grant(peer, now)

    def _grant(self, peer: NodeId, now: float) -> list[Effect]:
        """The newest key for a peer, now, whoever asked for it."""
        if self._newest is None or peer not in self._roster:
            return []
        self._giving.give(peer, now)
        return [SendLink(peer, self._newest.value.grant())]

    def _push(self, peer: NodeId, now: float) -> list[Effect]:
        """The newest key for a peer that shows itself to be behind; not at every sign of it."""
        return self._grant(peer, now) if self._giving.may_give_again(peer, now) else []

    def _grant_pending(self, now: float) -> list[Effect]:
        effects = [effect for peer in self._giving.take_due(now) for effect in self._grant(peer, now)]
        return [*effects, _timer(_GRANT, self._giving.next_due(now))]

    def _link_lost(self, peer: NodeId, now: float) -> list[Effect]:
        """What was just sent may be lost; what was just asked will not be answered."""
        is_lost = self._giving.link_lost(peer, now, is_up=peer in self._up)
        effects = self._grant_pending(now) if is_lost else []
        for key_id in self._search.waiting_for(peer):
            effects += self._ask_another(key_id, now)
        return effects

    # ---- taking -----------------------------------------------------------------------------------------------------

    def _link_message(self, event: LinkReceived, now: float, wall: float) -> list[Effect]:
        if event.peer not in self._roster:
            return []
        match event.message:
            case KeyGrant():
                return self._granted(event.peer, event.message, now, wall)
            case KeyRequest():
                return self._requested(event.peer, event.message.key_id, now)
            case _:
                return []

    def _requested(self, peer: NodeId, key_id: bytes, now: float) -> list[Effect]:
        effects: list[Effect] = []
        asked = self._held.get(key_id)
        if asked is not None and asked is not self._newest:
            effects.append(SendLink(peer, asked.value.grant()))
        return [*effects, *self._grant(peer, now)]

    def _granted(self, peer: NodeId, grant: KeyGrant, now: float, wall: float) -> list[Effect]:
        key_id = key_id_of(grant.key)
        self._search.found(key_id)
        newest = self._newest
        if key_id in self._held:
            if newest is not None and newest.value.key_id == key_id:
                self._giving.confirmed(peer)
            return []
        if key_id in self._retired:
            # Dropped for good: taking it up again would give an evicted machine's key a new life.
            return self._push(peer, now)
        if newest is not None and grant.epoch > newest.value.epoch + self._params.epoch_ahead_max:
            return [Publish(KeyRefused(peer, "its epoch is too far ahead"))]
        if not self._may_take(peer, now):
            return [Publish(KeyRefused(peer, "too many keys from one peer"))]
        key = GossipKey(grant.epoch, grant.key, grant.minted_by, int(wall * 1000))
        effects = self._learn(key, peer, now)
        if newest is not None and newest is self._newest:
            effects += self._push(peer, now)
        return [*effects, *self._schedule_rotation(now)]

    def _may_take(self, peer: NodeId, now: float) -> bool:
        """A bound on how fast one member can make everybody write to disk and change keys."""
        since, count = self._taken.get(peer, (now, 0))
        if now - since > self._params.grants_taken_window_s:
            since, count = now, 0
        self._taken[peer] = (since, count + 1)
        return count < self._params.grants_taken_max

    # ---- asking -----------------------------------------------------------------------------------------------------

    def _unknown_key(self, sender: NodeId, key_id: bytes, now: float) -> list[Effect]:
        """A datagram named a key that is not held. The sender is claimed, not proven: anybody may cause this."""
        if sender not in self._roster or sender == self._me or key_id in self._held:
            return []
        if key_id in self._retired:
            return self._push(sender, now)
        if not self._search.begin(key_id, sender, now):
            return []
        return [SendLink(sender, KeyRequest(key_id)), self._search_timer()]

    def _ask_another(self, key_id: bytes, now: float) -> list[Effect]:
        """The one asked did not answer: somebody else who has it will do."""
        # A node that was away believes nobody to be up, because it cannot open what they send.
        candidates = [peer for peer in self._up or self._roster.members() if peer in self._roster and peer != self._me]
        peer = self._search.next_peer(key_id, candidates, now)
        asked: list[Effect] = [] if peer is None else [SendLink(peer, KeyRequest(key_id))]
        return [*asked, self._search_timer()]

    def _search_timer(self) -> Effect:
        return _timer(_ASK, self._search.due_at())

    # ---- timers -----------------------------------------------------------------------------------------------------

    def _timer(self, event: TimerFired, now: float) -> list[Effect]:
        match event.key:
            case (_, "switch" | "retire"):
                before = (self._sending, tuple(self._held))
                effects = self._settle(now)
                if (self._sending, tuple(self._held)) != before:
                    effects.append(self._changed())
                return effects
            case (_, "rotate"):
                return self._schedule_rotation(now)
            case (_, "grant"):
                return self._grant_pending(now)
            case (_, "ask"):
                effects = [self._search_timer()]
                for key_id in self._search.overdue(now):
                    effects += self._ask_another(key_id, now)
                return effects
            case _:
                return []


def _timer(what: str, at: float | None) -> Effect:
    """Set the timer, or cancel it when there is nothing to wait for."""
    return CancelTimer((MACHINE, what)) if at is None else SetTimer((MACHINE, what), at)
