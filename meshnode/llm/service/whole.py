"""Everything of the subsystem that runs, as one service of the supervisor."""

from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import httpx2
import trio

from meshnode.kernel.errors import MeshError
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.kernel.logs import Logger
from meshnode.kernel.service import Policy
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.entries import Entries
from meshnode.llm.service.generate import Generations
from meshnode.llm.service.hosts import Hosts
from meshnode.llm.service.learning import Learning
from meshnode.llm.service.loaded import Loaded
from meshnode.llm.service.loads import Loads
from meshnode.llm.service.offering import OfferKeeper
from meshnode.llm.service.pinned import Pinned
from meshnode.llm.service.pull.pulls import Pulls
from meshnode.llm.service.served import Served
from meshnode.llm.service.trials import Trials
from meshnode.llm.service.trialstages import TrialStages
from meshnode.llm.service.weights.weights import Weights
from meshnode.llm.templates.client import TemplateWorker


class LlmService:
    """Runs everything of the subsystem under the supervisor. The mesh goes on without it."""

    name: Final = "llm"
    policy: Final = Policy.RESTART

    def __init__(
        self,
        *,
        calls: Calls,
        methods: Mapping[str, PeerMethod[Any]],
        hosts: Hosts,
        loads: Loads,
        entries: Entries,
        generations: Generations,
        keeper: OfferKeeper,
        learning: Learning,
        served: Served,
        loaded: Loaded,
        pinned: Pinned,
        trials: Trials,
        trial_stages: TrialStages,
        weights: Weights,
        pulls: Pulls,
        client: httpx2.AsyncClient,
        renderer: TemplateWorker,
        shipped: Path,
        log: Logger,
    ) -> None:
        self._calls = calls
        self._methods = methods
        self._parts = (
            hosts, loads, entries, generations, keeper, learning, served, loaded, pinned, trials, trial_stages
        )  # fmt: skip
        self._weights = weights
        self._pulls = pulls
        self._client = client
        self._renderer = renderer
        self._shipped = shipped
        self._log = log

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._calls.run, self._methods)
                await nursery.start(self._run_weights)
                await nursery.start(self._run_pulls)
                for part in self._parts:
                    nursery.start_soon(part.run)
                nursery.start_soon(self._contribute)
                task_status.started()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(2.0):
                await self._renderer.aclose()
                await self._client.aclose()

    async def _run_weights(self, task_status: trio.TaskStatus[None]) -> None:
        await self._weights.run(task_status=task_status)

    async def _run_pulls(self, task_status: trio.TaskStatus[None]) -> None:
        await self._pulls.run(task_status=task_status)

    async def _contribute(self) -> None:
        """The model that ships with the agent is one of this node's from the start."""
        try:
            async with aclosing(self._pulls.pull(str(self._shipped), node=None, whole=True)) as progress:
                async for _ in progress:
                    pass
        except MeshError as error:
            self._log.warning("the shipped model is not at hand", why=error.message)
