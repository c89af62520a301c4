"""What clients get: every token once, as in an undisturbed run, and an end; and no honest node is accused."""

from simulations.checkers.checker import Checker, Violation
from simulations.computer import Computer
from simulations.sharding.fabric import Fabric
from simulations.sharding.member import Client
from simulations.sharding.toy import undisturbed
from simulations.world import World

ENDS_WITHIN_S = 300.0


class Answers(Checker):
    """Watches every client of a fabric."""

    name = "answers"

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self.clients: list[Client] = []
        fabric.watchers.append(self)

    def attached(self, world: World) -> None:
        """Note where the time is."""
        self._world = world

    def asked(self, client: Client) -> None:
        """One more to watch."""
        self.clients.append(client)

    def emitted(self, client: Client, index: int, tokens: tuple[int, ...], pieces: tuple[bytes, ...]) -> None:
        """Where the last ones ended, and as they should be."""
        if client.end:
            self._object(client, f"got tokens after its end ({client.end})")
        if index != len(client.tokens):
            self._object(client, f"got token {index} when {len(client.tokens)} were there")
        if len(tokens) != len(pieces):
            self._object(client, f"got {len(tokens)} tokens with {len(pieces)} pieces")
        wanted, _ = undisturbed(client.prompt, client.max_tokens)
        if tuple(wanted[index : index + len(tokens)]) != tokens:
            right = wanted[index : index + len(tokens)]
            self._object(client, f"got {tokens} as token {index}; undisturbed it is {right}")

    def ended(self, client: Client) -> None:
        """A good end is the undisturbed one."""
        wanted, reason = undisturbed(client.prompt, client.max_tokens)
        stopped = client.stops_after is not None and len(client.tokens) >= client.stops_after
        if client.end in ("stop", "length") and not stopped and (client.tokens, client.end) != (wanted, reason):
            self._object(client, f"ended ({client.end}) after {len(client.tokens)} of {len(wanted)} tokens ({reason})")
        if client.end not in ("stop", "length", "cancelled") and not client.words:
            self._object(client, f"failed ({client.end}) without a word")

    def accused(self, by: Computer, peer: Computer, words: str) -> None:
        """Only liars are."""
        if peer.index not in self._fabric.ever_lied:
            raise Violation(self.name, self._world.now, f"{by} accuses {peer}, which never lied: {words}")

    def swept(self, world: World) -> None:
        """Nobody waits for ever, as long as its entry runs."""
        for member in self._fabric.members.values():
            if member.computer.paused:
                continue
            for client in member.clients.values():
                if not client.end and world.now - client.began > ENDS_WITHIN_S:
                    state = client.session.state
                    self._object(client, f"waits for {world.now - client.began:.0f} s, in state {state}")

    def _object(self, client: Client, words: str) -> None:
        raise Violation(self.name, self._world.now, f"a client of {client.model}, asked at {client.began:.3f}, {words}")
