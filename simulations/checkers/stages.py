"""Stages and loads: never two loads of one model at one coordinator, no more memory than there is, tables bounded.

In the end no stage is left that nobody answers for, and none that nobody uses.
"""

from protocol.sharding.session import STEM_BYTES
from simulations.checkers.checker import Checker, Violation
from simulations.sharding.fabric import Fabric
from simulations.world import World

OVERDUE_S = 45.0
LEFT_S = 1.0


class OwnedStages(Checker):
    """Looks at all members of a fabric."""

    name = "stages"

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._lonely: dict[tuple[int, bytes], float] = {}
        self.is_quiet = False  # no faults for a while: every stage must have an owner

    def swept(self, world: World) -> None:
        """All of it, every second."""
        fabric = self._fabric
        for member in fabric.members.values():
            loading = [held.pipeline.model for held in member.loading.pipelines if held.state == "loading"]
            twice = sorted({model for model in loading if loading.count(model) > 1})
            if twice:
                self._object(world, f"{member.computer} loads {twice} twice at once")
            if member.stages.used_bytes > fabric.capacity[member.computer.index]:
                self._object(world, f"{member.computer} holds more than its memory")
            for name, size, size_max in member.sizes:
                if size > size_max:
                    self._object(world, f"{member.computer} has {size} {name}, the limit is {size_max}")
        self._look_for_orphans(world)
        if fabric.peaceful:
            self._look_for_leftovers(world)

    def _look_for_leftovers(self, world: World) -> None:
        """Who left or stopped early is forgotten by every stage within a second, give or take a slow frame."""
        over = {
            client.session.id[:STEM_BYTES]
            for member in self._fabric.members.values()
            for client in member.clients.values()
            if client.end and world.now - client.ended_at > LEFT_S
        }
        for member in self._fabric.members.values():
            for engine in member.stages.engines.values():
                if any(session[:STEM_BYTES] in over for session in (*engine.sessions, *engine.sequences)):
                    self._object(world, f"{member.computer} still works for a client that was gone {LEFT_S} s ago")

    def _look_for_orphans(self, world: World) -> None:
        owned = {
            held.pipeline.id
            for member in self._fabric.members.values()
            if member.loading.is_coordinator
            for held in member.loading.pipelines
        }
        lonely = {
            (member.computer.index, name)
            for member in self._fabric.members.values()
            for name in member.stages.engines
            if name not in owned
        }
        self._lonely = {key: self._lonely.get(key, world.now) for key in lonely} if self.is_quiet else {}
        for (index, _), since in self._lonely.items():
            if world.now - since > OVERDUE_S:
                self._object(world, f"#{index} holds a stage that no coordinator answers for")

    def finished(self, world: World) -> None:
        """Nobody asked for anything for longer than pipelines are kept."""
        for member in self._fabric.members.values():
            if member.stages.engines or member.hosting.stages:
                self._object(
                    world, f"{member.computer} still holds {len(member.stages.engines)} stages that nobody uses"
                )
            if member.loading.waiting or member.loading.loads:
                self._object(world, f"{member.computer} still has asks or loads")

    def _object(self, world: World, words: str) -> None:
        raise Violation(self.name, world.now, words)
