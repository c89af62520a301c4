"""A tiny program for tests of the world: it pings a neighbour on a timer, counts answers, keeps a number on disk."""

from collections.abc import Mapping, Sequence

from protocol.effects import (
    CancelTimer,
    DatagramReceived,
    Effect,
    FrameReceived,
    LinkLost,
    LinkOpened,
    NetworkInput,
    Persist,
    Publish,
    SendDatagram,
    SendFrame,
    SetTimer,
    TimerFired,
)
from protocol.ids import Address, NodeId
from simulations.computer import Computer
from simulations.program import Machine


class EchoMachine:
    """Remembers everything that happened to it in `log`."""

    def __init__(self, computer: Computer, durable: Mapping[str, Mapping[bytes, bytes]]) -> None:
        self.computer = computer
        self.durable = durable
        self.boot = int.from_bytes(durable.get("echo", {}).get(b"boot", b"\x00"), "big") + 1
        self.neighbour: Address | None = None
        self.period_s = 1.0
        self.log: list[tuple[float, object]] = []
        self.answers = 0

    def start(self, now: float, wall: float) -> list[Effect]:
        first = now + self.computer.rng.random()
        return [Persist("echo", b"boot", self.boot.to_bytes(4, "big")), SetTimer(("echo", "ping"), first)]

    def handle(self, event: NetworkInput, now: float, wall: float) -> list[Effect]:
        self.log.append((now, event))
        match event:
            case TimerFired(("echo", "ping")):
                effects: list[Effect] = [SetTimer(("echo", "ping"), now + self.period_s)]
                if self.neighbour is not None:
                    effects.append(SendDatagram(self.neighbour, b"ping %d" % self.boot, True))
                    effects.append(SetTimer(("echo", "late"), now + 0.5))
                return effects
            case TimerFired(("echo", "late")):
                return [Publish("late")]
            case DatagramReceived(data, source) if data.startswith(b"ping"):
                return [SendDatagram(source, b"pong" + data[4:], True)]
            case DatagramReceived():
                self.answers += 1
                return [CancelTimer(("echo", "late"))]
            case FrameReceived(peer, data) if not data.startswith(b"re:"):
                return [SendFrame(peer, b"re:" + data)]
            case LinkOpened() | LinkLost():
                return [Publish(event)]
        return []


class EchoProgram:
    """Every computer pings the next one."""

    def __init__(self) -> None:
        self.outlaws: set[NodeId] = set()

    def boot(self, computer: Computer, now: float, wall: float) -> EchoMachine:
        machine = EchoMachine(computer, computer.disk.snapshot())
        computers = computer.world.computers
        machine.neighbour = computers[(computer.index + 1) % len(computers)].address
        return machine

    def boot_epoch(self, machine: Machine) -> int:
        assert isinstance(machine, EchoMachine)
        return machine.boot

    def accepts(self, machine: Machine, peer: NodeId) -> bool:
        return peer not in self.outlaws

    def tombstone(self, machine: Machine, peer: NodeId) -> bytes:
        return b""

    def admit(self, computers: Sequence[Computer]) -> None:
        """Nothing to prepare."""

    def is_quorate(self, computer: Computer) -> bool:
        return False

    def coordinating(self, computer: Computer) -> int | None:
        return None

    def knows(self, computer: Computer, peer: NodeId) -> bool:
        return peer not in self.outlaws

    def believed_up(self, computer: Computer) -> Sequence[NodeId]:
        return []

    def digest(self, computer: Computer) -> bytes:
        return b""

    def observe(self, computer: Computer, event: object) -> None:
        """Nothing to answer."""

    def queue_sizes(self, machine: Machine) -> Sequence[tuple[str, int, int]]:
        assert isinstance(machine, EchoMachine)
        return [("answers", machine.answers, 1_000_000)]
