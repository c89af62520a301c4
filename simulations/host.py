"""The one place that knows protocol.node: how a computer of a world becomes a member that runs the real hub.

It does what the agent's driver does around the hub: counts boots, gives it the first keys and contacts that a join
brings, answers RotationDue with random bytes, samples resources, and carries trust statements. It decides nothing.
"""

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Final, cast

import msgspec

from protocol.heartbeats.events import Sample, SampleTaken
from protocol.ids import Address, NodeId, mesh_id_of
from protocol.membership.events import AddressesChanged, Depart, IdentityFreed
from protocol.node import Node, NodeParameters
from protocol.records.collection import Collection
from protocol.records.events import PutRecord
from protocol.records.record import open_record
from protocol.trust.authority import Denied, evicting, gate, tombstone, withdrawing
from protocol.trust.collection import trust_collection
from protocol.trust.events import MintKey, RotationDue
from protocol.trust.keys import GossipKey, durable_keys
from protocol.trust.roster import Roster
from protocol.trust.statements import (
    TRUST_COLLECTION,
    TrustStatement,
    admission,
    decode,
    record_key,
    seal,
    succeeding_time,
)
from protocol.wire import limits
from protocol.wire.crypto import STATEMENT_DOMAIN
from protocol.wire.messages import Accusation, Alive, Gossip, Leaving, StatementBody
from protocol.wire.statements import Stated
from simulations.computer import DOWN, Computer
from simulations.program import Machine
from simulations.suite import SimSuite

if TYPE_CHECKING:
    from simulations.world import World

BOOT_ORIGIN: Final = 1_577_836_800  # boot epochs count from 2020-01-01
CONTACTS: Final = 5  # so many addresses of peers come with a join
SHARED_COLLECTION: Final = "shared"  # any member may write any key of it


class MeshProgram:
    """Runs protocol.node.Node on every computer of one world.

    `own_rosters` gives every node a roster of its own, so that evictions reach them one after the other; a shared one
    saves gigabytes in a world of thousands. `sample_s` is the pause between resource samples; None: no heartbeats.
    `is_settled`: nobody needs contacts, see simulations.settled. `collections`: more records than the hub's own.
    """

    def __init__(
        self,
        world: "World",
        *,
        params: NodeParameters | None = None,
        own_rosters: bool = False,
        sample_s: float | None = None,
        is_settled: bool = False,
        collections: Sequence[Collection] = (),
    ) -> None:
        self._world = world
        self._collections = tuple(collections)
        self._is_settled = is_settled
        self._params = params
        self._own_rosters = own_rosters
        self._sample_s = sample_s
        self._root, _ = world.ring.identity(f"root/{world.seed}".encode())
        self._mesh_id = mesh_id_of(self._root)
        self._admissions: list[bytes] = []
        self._contacts: dict[NodeId, Address] = {}
        self._shared: Roster | None = None
        self._statements: MutableMapping[bytes, Stated] = {}
        self._first_key = world.ring.identity(f"gossip key/{world.seed}".encode())[0]

    # ---- simulations.computer.Program -----------------------------------------------------------------------------

    def boot(self, computer: Computer, now: float, wall: float) -> Node:
        """Count the boot and build the hub from what the disk holds."""
        table = computer.disk.tables.setdefault("node", {})
        stored = int.from_bytes(table.get(b"boot", b""), "big")
        boot = max(stored + 1, min(int(wall) - BOOT_ORIGIN, limits.BOOT_MAX))
        table[b"boot"] = boot.to_bytes(4, "big")
        if self._sample_s is not None:
            self._world.after(computer.rng.uniform(0.0, 1.0), self._sample, computer, computer.run)
        suite = SimSuite(self._world.ring, computer.public_key)
        # A join brings addresses; later starts live on what the machines remembered.
        contacts = self._contacts if computer.run == 1 and not self._is_settled else {}
        return Node(
            me=computer.node_id,
            mesh_id=self._mesh_id,
            boot=boot,
            founder=computer.index == 0,
            suite=suite,
            rng=computer.rng,
            roster=self._roster_of(computer),
            durable=computer.disk.snapshot(),
            collections=(trust_collection(self._root, suite), Collection(SHARED_COLLECTION), *self._collections),
            record_store=computer.disk.records,
            addresses=(computer.address,),
            contacts={peer: address for peer, address in contacts.items() if peer != computer.node_id},
            params=self._params,
            statements=self._statements,
        )

    def boot_epoch(self, machine: Machine) -> int:
        """What the HELLO of this machine states."""
        return cast(Node, machine).boot

    def accepts(self, machine: Machine, peer: NodeId) -> bool:
        """Links check the roster by public key."""
        roster, found = cast(Node, machine).roster, self._world.find(peer)
        return found is not None and gate(roster, peer, found.public_key) is None

    def tombstone(self, machine: Machine, peer: NodeId) -> bytes:
        """As the agent's listener."""
        return tombstone(cast(Node, machine).roster, peer)

    def admit(self, computers: Sequence[Computer]) -> None:
        """Everybody knows these members; they know the first gossip key and the addresses of the first few."""
        made = [self._admission(computer) for computer in computers]
        self._admissions += made
        if self._shared is not None:
            for statement in made:
                self._shared.apply(statement)
        if self._own_rosters:
            for computer in self._world.up():
                for statement in made:
                    self._told(computer, statement)
        for peer in self._world.computers[:CONTACTS]:
            self._contacts.setdefault(peer.node_id, peer.address)
        key = GossipKey(1, self._first_key, bytes(8), int(self._world.epoch * 1000))
        for computer in computers:
            computer.disk.tables["keys"] = dict(durable_keys([key]))

    def queue_sizes(self, machine: Machine) -> Sequence[tuple[str, int, int]]:
        """Tables of the hub and the limits that a mesh of this size gives them."""
        node = cast(Node, machine)
        members = len(node.roster) + 1
        return (
            ("membership's suspicions", len(node.membership.suspects()), members),
            ("membership's known", len(node.membership.view.known), members),
            ("membership's peers", len(node.membership.view.peers), members),
            ("heartbeats' latest", len(node.heartbeats.latest), members),
            ("gossip keys", len(node.keyring.keys()), 8),
        )

    def is_quorate(self, computer: Computer) -> bool:
        """Asked as a service would ask right before exclusive work."""
        node = cast(Node | None, computer.machine)
        return node is not None and node.election.is_quorate(computer.now(), computer.wall())

    def coordinating(self, computer: Computer) -> int | None:
        """The term in which it coordinates."""
        node = cast(Node | None, computer.machine)
        return node.election.term if node is not None and node.election.is_coordinator else None

    def knows(self, computer: Computer, peer: NodeId) -> bool:
        """Its roster."""
        return peer in cast(Node, computer.machine).roster

    def believed_up(self, computer: Computer) -> Sequence[NodeId]:
        """Its membership view."""
        return cast(Node, computer.machine).membership.view.peers

    def digest(self, computer: Computer) -> bytes:
        """Trust and the shared collection."""
        records = cast(Node, computer.machine).records
        return records.digest(TRUST_COLLECTION) + records.digest(SHARED_COLLECTION)

    def observe(self, computer: Computer, event: object) -> None:
        """Answer what the hub asks of its driver."""
        if type(event) is RotationDue:
            self._world.after(0.0, self._mint, computer, computer.run)
        elif type(event) is IdentityFreed:
            computer.disk.tables["node"][b"boot"] = event.boot.to_bytes(4, "big")
            self._world.after(0.0, _again, computer, computer.run)

    # ---- questions of the scenarios ---------------------------------------------------------------------------------

    def key_id(self, computer: Computer) -> bytes:
        """The id of the gossip key that the node seals with."""
        return cast(Node, computer.machine).keyring.sending()[0]

    def heartbeat_ages(self, computer: Computer) -> tuple[list[float], int]:
        """Seconds since the last heartbeat of each other running node, and how many were never heard."""
        now, latest = computer.now(), cast(Node, computer.machine).heartbeats.latest
        others = [other.node_id for other in self._world.up() if other is not computer]
        ages = [now - latest[other][1] for other in others if other in latest]
        return ages, len(others) - len(ages)

    def knows_of_twin(self, computer: Computer) -> bool:
        """Whether the node noticed that another computer has its key."""
        return cast(Node, computer.machine).membership.contested

    def boot_seen(self, computer: Computer, peer: NodeId) -> int | None:
        """The boot in which the node has a peer up; None if it does not."""
        view = cast(Node, computer.machine).membership.view
        return view.rank(peer)[0] if peer in view.up else None

    def refused(self, computer: Computer, reason: str) -> int:
        """How many datagrams the node refused for this reason since it started."""
        return cast(Node, computer.machine).datagrams.drops[reason]

    def value(self, computer: Computer, key: bytes) -> bytes | None:
        """What the node reads under a key of the shared collection."""
        record = cast(Node, computer.machine).records.get(SHARED_COLLECTION, key)
        return None if record is None else record.value

    # ---- what an attacker with a member's keys does -----------------------------------------------------------------

    def seal(self, source: Computer, target: Computer, messages: Sequence[object]) -> bytes | None:
        """A genuine datagram of the source with messages of the attacker's choice."""
        return cast(Node, source.machine).datagrams.seal(target.node_id, messages)

    def forgeries(self, insider: Computer, victim: Computer, accusers: Sequence[Computer]) -> list[Gossip]:
        """Statements in the names of others, signed by the insider instead."""
        suite = SimSuite(self._world.ring, insider.public_key)
        stated = cast(Node, insider.machine).membership.view.known.get(victim.node_id)
        if stated is None or not isinstance(stated.body, Alive):
            return []
        alive, short = stated.body, self._world.short
        bodies: list[StatementBody] = [
            Leaving(alive.signer, alive.boot, alive.incarnation + 1),
            Alive(alive.signer, alive.boot + 1000, 0, alive.version_min, alive.version_max, alive.addresses),
        ]
        for accuser in accusers:
            boot = cast(Node, accuser.machine).boot
            bodies.append(Accusation(short(accuser.node_id), boot, 2**40, alive.signer, alive.boot, alive.incarnation))
        blobs = [msgspec.msgpack.encode(body) for body in bodies]
        # An insider's signature over the right bytes is a real signature, only of the wrong node.
        signed = [blob + suite.forge(STATEMENT_DOMAIN, blob) for blob in blobs]
        return [Gossip([blob]) for blob in signed]

    # ---- what a person or a service does --------------------------------------------------------------------------

    def leave(self, computer: Computer, stop_after_s: float = 1.0) -> None:
        """The owner stops the agent in good order."""
        computer.input(Depart())
        self._world.after(stop_after_s, _stop, computer, computer.run)

    def move(self, computer: Computer, address: Address) -> None:
        """The computer gets a new address, and its agent notices."""
        computer.address = address
        self._world.network.attach(computer)
        if computer.state != DOWN:
            computer.input(AddressesChanged((address,)))

    def rotate(self, computer: Computer) -> None:
        """Rotate the gossip key by hand at this node."""
        self._mint(computer, computer.run)

    def evict(self, victim: Computer, by: Computer) -> None:
        """The root evicts a member; the records carry the statement. Needs rosters of their own for all nodes."""
        victim.evicted = True
        node = cast(Node, by.machine)
        said = evicting(node.roster, node.policy, by.node_id, victim.node_id, reason="", wall_ms=self._wall_ms())
        if said is not None and not isinstance(said, Denied):
            by.input(PutRecord(TRUST_COLLECTION, record_key(victim.node_id), self._seal(said)))

    def withdraw(self, victim: Computer, by: Computer) -> None:
        """The root takes back an admission; the records carry that. Needs rosters of their own for all nodes."""
        said = withdrawing(cast(Node, by.machine).roster, victim.node_id, by=by.node_id, wall_ms=self._wall_ms())
        if said is not None:
            victim.evicted = True
            by.input(PutRecord(TRUST_COLLECTION, record_key(victim.node_id), self._seal(said)))

    def admit_again(self, computer: Computer, by: Computer) -> None:
        """The root admits a machine whose admission was withdrawn; it restarts with the new one, as a join does."""
        withdrawn = decode(cast(Node, by.machine).roster.statement(computer.node_id) or b"")
        # protocol.trust.authority decides this for real keys; those of a world are no points of the curve.
        sealed = self._admission(computer, succeeding_time(withdrawn, self._wall_ms()))
        self._admissions.append(sealed)
        computer.evicted = False
        by.input(PutRecord(TRUST_COLLECTION, record_key(computer.node_id), sealed))
        computer.restart()

    def put(self, computer: Computer, key: bytes, value: bytes) -> None:
        """Write a shared record at this node."""
        computer.input(PutRecord(SHARED_COLLECTION, key, value))

    # ---- trust ----------------------------------------------------------------------------------------------------

    def _roster_of(self, computer: Computer) -> Roster:
        verifier = SimSuite(self._world.ring, computer.public_key)
        if self._own_rosters:
            store = computer.disk.records
            told = [
                record.value
                for _, blob in store.scan(TRUST_COLLECTION, b"", None, 10_000)
                if (record := open_record(blob))
            ]
            return Roster(root_public_key=self._root, verifier=verifier, statements=[*self._admissions, *told])
        if self._shared is None:
            self._shared = Roster(root_public_key=self._root, verifier=verifier, statements=self._admissions)
        return self._shared

    def _admission(self, computer: Computer, admitted_at: int = 1) -> bytes:
        key, name = computer.public_key, f"node-{computer.index}"
        return self._seal(
            admission(public_key=key, name=name, role="admin", admitted_at=admitted_at, by=computer.node_id)
        )

    def _seal(self, statement: TrustStatement) -> bytes:
        return seal(statement, SimSuite(self._world.ring, self._root))

    def _told(self, computer: Computer, statement: bytes) -> None:
        changed = cast(Node, computer.machine).roster.apply(statement)
        if changed is not None:
            computer.input(changed)

    # ---- the driver's small services --------------------------------------------------------------------------------

    def _mint(self, computer: Computer, run: int) -> None:
        if computer.run == run and computer.state != DOWN:
            computer.input(MintKey(computer.rng.randbytes(32)))

    def _sample(self, computer: Computer, run: int) -> None:
        if computer.run != run or computer.state == DOWN or self._sample_s is None:
            return
        rng = computer.rng
        # Noise most of the time, and now and then something that readers would act on.
        cpu_pm = rng.randrange(600, 1000) if rng.random() < 0.05 else rng.randrange(20, 120)
        ram_used_mb, uptime_s = 3000 + rng.randrange(0, 200), int(self._world.now - computer.started_at)
        sample = Sample(cpu_pm, cpu_pm // 4, ram_used_mb, 100_000, -1, -128, -1, 0, -1, 4, uptime_s, 400)
        computer.input(SampleTaken(sample))
        self._world.after(self._sample_s, self._sample, computer, run)

    def _wall_ms(self) -> int:
        return int((self._world.epoch + self._world.now) * 1000)


def _again(computer: Computer, run: int) -> None:
    if computer.run == run and computer.state != DOWN:
        computer.restart()


def _stop(computer: Computer, run: int) -> None:
    if computer.run == run:
        computer.crash()
