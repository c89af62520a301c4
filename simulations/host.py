"""The one place that knows protocol.node: how a computer of a world becomes a member that runs the real hub.

It does what the agent's driver does around the hub: counts boots, gives it the first keys and contacts that a join
brings, answers RotationDue with random bytes, samples resources, and carries trust statements. It decides nothing.
"""

from collections.abc import MutableMapping, Sequence
from typing import Final, cast

from protocol.heartbeats.events import Sample, SampleTaken
from protocol.ids import Address, NodeId, mesh_id_of, pack_address
from protocol.membership.events import AddressesChanged, Depart
from protocol.node import Node, NodeParameters
from protocol.trust.events import MintKey, RosterChanged, RotationDue
from protocol.trust.keys import GossipKey, durable_keys
from protocol.trust.roster import Roster
from protocol.trust.statements import TrustStatement, admission, eviction, seal
from protocol.wire import limits
from protocol.wire.messages import Alive
from protocol.wire.statements import Stated, StatementCodec
from simulations.computer import DOWN, Computer, Machine
from simulations.suite import SimSuite
from simulations.world import World

BOOT_ORIGIN: Final = 1_577_836_800  # boot epochs count from 2020-01-01
CONTACTS: Final = 5  # so many addresses of peers come with a join
STATEMENTS_SHARED_MAX: Final = 500_000


class MeshProgram:
    """Runs protocol.node.Node on every computer of one world.

    `own_rosters` gives every node a roster of its own, so that evictions reach them one after the other; a shared one
    saves gigabytes in a world of thousands. `sample_s` is the pause between resource samples; None: no heartbeats.
    """

    def __init__(
        self,
        world: World,
        *,
        params: NodeParameters | None = None,
        own_rosters: bool = False,
        sample_s: float | None = None,
    ) -> None:
        self._world = world
        self._params = params
        self._own_rosters = own_rosters
        self._sample_s = sample_s
        self._root, _ = world.ring.identity(f"root/{world.seed}".encode())
        self._mesh_id = mesh_id_of(self._root)
        self._trust: list[bytes] = []
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
        durable = computer.disk.snapshot()
        if self._sample_s is not None:
            self._world.after(computer.rng.uniform(0.0, 1.0), self._sample, computer, computer.run)
        return Node(
            me=computer.node_id,
            mesh_id=self._mesh_id,
            boot=boot,
            suite=SimSuite(self._world.ring, computer.public_key),
            rng=computer.rng,
            roster=self._roster_of(computer),
            durable=durable,
            addresses=(computer.address,),
            params=self._params,
            statements=self._statements,
        )

    def boot_epoch(self, machine: Machine) -> int:
        """What the HELLO of this machine states."""
        return cast(Node, machine).boot

    def accepts(self, machine: Machine, peer: NodeId) -> bool:
        """Links check the roster by public key."""
        return peer in cast(Node, machine).roster

    def admit(self, computers: Sequence[Computer]) -> None:
        """Everybody knows these members; they know the gossip key and the addresses of the first few."""
        made = [self._admission(computer) for computer in computers]
        self._trust += made
        if self._shared is not None:
            for statement in made:
                self._shared.apply(statement)
        for computer in self._world.computers:
            if self._own_rosters and computer.state != DOWN:
                for statement in made:
                    self._learn(computer, statement)
        key = GossipKey(1, self._first_key, bytes(8), int(self._world.epoch * 1000))
        contacts = [self._contact(peer) for peer in self._world.computers[:CONTACTS]]
        for computer in computers:
            computer.disk.tables["keys"] = dict(durable_keys([key]))
            computer.disk.tables["membership"] = {
                signer.encode("ascii"): blob for signer, blob in contacts if signer != computer.node_id
            }

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

    def observe(self, computer: Computer, event: object) -> None:
        """Answer what the hub asks of its driver."""
        if type(event) is RotationDue:
            self._world.after(0.0, self._mint, computer, computer.run)

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
        """The root evicts a member; the statement reaches every other node at a moment of its own."""
        statement = eviction(node_id=victim.node_id, evicted_at=self._wall_ms(), by=by.node_id)
        sealed = self._seal(statement)
        self._trust.append(sealed)
        for computer in self._world.computers:
            if computer is not victim:
                delay = 0.0 if computer is by else self._world.rng.uniform(0.0, 1.0)
                self._world.after(delay, self._learn, computer, sealed)

    # ---- trust ----------------------------------------------------------------------------------------------------

    def _roster_of(self, computer: Computer) -> Roster:
        verifier = SimSuite(self._world.ring, computer.public_key)
        if self._own_rosters:
            # What it was told before is on its disk; the admissions came with the join.
            told = computer.disk.tables.get("trust", {})
            return Roster(root_public_key=self._root, verifier=verifier, statements=[*self._admissions(), *told.values()])
        if self._shared is None:
            self._shared = Roster(root_public_key=self._root, verifier=verifier, statements=self._trust)
        return self._shared

    def _admissions(self) -> list[bytes]:
        return [self._admission(computer) for computer in self._world.computers]

    def _admission(self, computer: Computer) -> bytes:
        name = f"node-{computer.index}"
        made = admission(
            public_key=computer.public_key, name=name, role="member", admitted_at=1, by=computer.node_id
        )
        return self._seal(made)

    def _seal(self, statement: TrustStatement) -> bytes:
        return seal(statement, SimSuite(self._world.ring, self._root))

    def _learn(self, computer: Computer, statement: bytes) -> None:
        """A trust statement reaches a node as soon as anything reaches it."""
        if computer.state == DOWN or computer.paused or computer.cut_in:
            self._world.after(1.0, self._learn, computer, statement)
            return
        roster = cast(Roster, cast(Node, computer.machine).roster)
        computer.disk.tables.setdefault("trust", {})[statement[-16:]] = statement
        changed = roster.apply(statement)
        if changed is not None:
            computer.input(changed)
            if not self._own_rosters:
                self._tell_all(computer, changed)

    def _tell_all(self, computer: Computer, changed: RosterChanged) -> None:
        for other in self._world.computers:
            if other is not computer and other.state != DOWN:
                other.input(changed)

    # ---- the driver's small services --------------------------------------------------------------------------------

    def _contact(self, peer: Computer) -> tuple[NodeId, bytes]:
        short = self._world.short(peer.node_id)
        codec = StatementCodec(SimSuite(self._world.ring, peer.public_key), self._roster_of(peer))
        version = limits.PROTOCOL_VERSION
        body = Alive(short, 1, 0, limits.PROTOCOL_VERSION_MIN, version, [pack_address(peer.address)])
        return peer.node_id, codec.sign(peer.node_id, body).blob

    def _mint(self, computer: Computer, run: int) -> None:
        if computer.run == run and computer.state != DOWN:
            computer.input(MintKey(computer.rng.randbytes(32)))

    def _sample(self, computer: Computer, run: int) -> None:
        if computer.run != run or computer.state == DOWN or self._sample_s is None:
            return
        rng = computer.rng
        cpu_pm, ram_used_mb = rng.randrange(0, 400), 3000 + rng.randrange(0, 200)
        computer.input(
            SampleTaken(Sample(cpu_pm, cpu_pm // 4, ram_used_mb, 100_000, -1, -128, -1, 0, -1, 4, int(computer.now()), 400))
        )
        self._world.after(self._sample_s, self._sample, computer, run)

    def _wall_ms(self) -> int:
        return int((self._world.epoch + self._world.now) * 1000)


def _stop(computer: Computer, run: int) -> None:
    if computer.run == run:
        computer.crash()
