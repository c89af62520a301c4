"""Builds the llm subsystem: what to run, to mount, to answer to peers, and to tell of protocol events."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
import msgspec

from meshnode.api.routing import Mount
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.kernel.records import RecordWriter
from meshnode.kernel.resources.host import process_cpu_s
from meshnode.llm.peers.stages import stage_methods
from meshnode.llm.peers.weights import weight_methods
from meshnode.llm.routes.mount import llm_routes
from meshnode.llm.service.calls import Calls
from meshnode.llm.service.chats import Chats
from meshnode.llm.service.desk import Desk
from meshnode.llm.service.engines.upstream import Upstreams, parse_upstreams
from meshnode.llm.service.entries import Entries
from meshnode.llm.service.generate import Generations
from meshnode.llm.service.hosts import Hosts
from meshnode.llm.service.learning import Learning, Remembered, weight_bytes
from meshnode.llm.service.lending import Lent, Measured
from meshnode.llm.service.loaded import Loaded
from meshnode.llm.service.loads import Loads, Planning
from meshnode.llm.service.models import Models, parse_aliases
from meshnode.llm.service.offering import OfferKeeper, Offers
from meshnode.llm.service.pinned import Pinned
from meshnode.llm.service.pipelines import Pipelines
from meshnode.llm.service.prompts import CONTEXT_DEFAULT, Prompts
from meshnode.llm.service.pull.names import Names
from meshnode.llm.service.pull.offers import Offers as PullOffers
from meshnode.llm.service.pull.offers import shipped_catalogue
from meshnode.llm.service.pull.pulls import Pulls
from meshnode.llm.service.recording import Recording
from meshnode.llm.service.served import Served
from meshnode.llm.service.singles import Singles
from meshnode.llm.service.trials import Trials
from meshnode.llm.service.trialstages import TrialStages
from meshnode.llm.service.weights.manifest import Manifest
from meshnode.llm.service.weights.records import ModelRecords
from meshnode.llm.service.weights.room import disk_sizes
from meshnode.llm.service.weights.shapes import Shapes
from meshnode.llm.service.weights.weights import Weights
from meshnode.llm.service.whole import LlmService
from meshnode.llm.setup.ground import LlmGround
from meshnode.llm.store import WeightStore
from meshnode.llm.templates.client import TemplateWorker
from protocol.effects import Persist
from protocol.election.events import CoordinatorChanged
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft, PeerUp
from protocol.sharding.held import LoadingParameters
from protocol.sharding.hosting import Hosting
from protocol.sharding.loading import LoadingMachine
from protocol.sharding.offers import Speed
from protocol.sharding.pipelines import Answer, EnsureRequest, MembersUp, Pipeline, StageCommand
from protocol.sharding.plans import Refusal
from protocol.sharding.predict import NOTHING_LEARNT
from protocol.trust import authority

FIRST_TOKEN: Final = 1_000_000  # record writers' tokens, apart from those of others
ENSURE_S: Final = 10.0
REPORT_S: Final = 5.0
SHIPPED: Final = Path(__file__).parents[1] / "data" / "meshnode-demo.gguf"
MACHINE: Final = "llm"  # under which rows of the key-value store are kept
_SPEED: Final = b"speed"
_LEARNT: Final = b"learnt"


@dataclass(frozen=True)
class Llm:
    """What the composition root mounts and runs. `observe` must be given every event of the protocol."""

    service: LlmService
    desk: Desk
    pulls: Pulls
    chats: Chats
    methods: Mapping[str, PeerMethod[Any]]
    mount: Mount
    observe: Callable[[object], None]


def build_llm(ground: LlmGround) -> Llm:
    """Wire it. Raises MeshError BAD_SETTING."""
    return _Assembly(ground).built()


class _Assembly:
    """Builds from files to answers. Where two parts need each other, one asks only while both run, through `self`."""

    def __init__(self, ground: LlmGround) -> None:
        self._ground = ground
        settings = ground.settings
        for secret in (settings.hub_token, *(pair.partition("=")[2] for pair in settings.upstream_keys)):
            if secret:
                ground.hidden.hide(secret)
        self._me = ground.hub.me
        self._calls = Calls(me=self._me, links=ground.links, log=ground.log("llm.calls"))
        self._writer = RecordWriter(ground.driver, FIRST_TOKEN)
        self._client = httpx2.AsyncClient()
        self._offers = Offers(ground.hub)
        self._store = WeightStore(ground.database)
        self._weights = self._build_weights()
        self._models = Models(
            library=self._weights,
            aliases=parse_aliases(settings.aliases),
            default=settings.default_model,
            pinned=settings.pinned,
            states=lambda: self._loaded.states(),
        )
        self._shapes = Shapes(self._weights)
        self._planning = Planning(
            shapes=self._shapes,
            offers=self._offers,
            offload=ground.offload,
            slots=settings.slots,
            stages_min=settings.stages_min,
            tested=lambda: self._trials.tested(),
        )
        self._pulls = self._build_pulls()
        self._lent = self._build_lent()
        self._learning = self._build_learning()
        self._hosts = self._build_hosts()
        self._loads = self._build_loads()
        self._loaded = Loaded(
            me=self._me,
            hub=ground.hub,
            machine=self._loads.machine,
            writer=self._writer,
            name_of=ground.name_of,
            now=ground.now,
            log=ground.log("llm.loaded"),
        )
        self._entries = Entries(calls=self._calls, hosts=self._hosts, log=ground.log("llm.entry"))
        self._trials = Trials(
            calls=self._calls,
            entries=self._entries,
            hub=ground.hub,
            writer=self._writer,
            offload=ground.offload,
            now=ground.now,
            log=ground.log("llm.trial"),
        )
        self._pipelines = Pipelines(ensure=self._ensure, name_of=ground.name_of, now=ground.now)
        self._renderer = TemplateWorker(clock_wall=ground.wall, cpu_s=process_cpu_s)
        self._prompts = Prompts(
            models=self._models,
            renderer=self._renderer,
            calls=self._calls,
            forget=self._pipelines.forget,
            context=settings.context,
        )
        self._pinned = Pinned(
            names=settings.pinned,
            find=self._models.find,
            context=self._prompts.wanted_context,
            ask=self._ensure,
            log=ground.log("llm.pinned"),
        )
        self._singles = Singles(
            models=self._models,
            prompts=self._prompts,
            pipelines=self._pipelines,
            calls=self._calls,
            entries=self._entries,
        )
        self._generations = Generations(
            models=self._models,
            prompts=self._prompts,
            pipelines=self._pipelines,
            calls=self._calls,
            entries=self._entries,
            now=ground.now,
            wall=ground.wall,
            log=ground.log("llm.generate"),
        )

    def built(self) -> Llm:
        """The parts that others see."""
        ground = self._ground
        settings, log = ground.settings, ground.log
        upstreams = Upstreams(parse_upstreams(settings.upstreams, settings.upstream_keys), self._client)
        served = Served(me=self._me, hub=ground.hub, writer=self._writer, upstreams=upstreams, log=log("llm.upstream"))
        self._keeper = OfferKeeper(
            me=self._me, hub=ground.hub, lending=self._lent, writer=self._writer, log=log("llm.offer")
        )
        desk = Desk(
            calls=self._calls,
            models=self._models,
            served=served,
            pinned=self._pinned,
            upstreams=upstreams,
            generations=self._generations,
            singles=self._singles,
            pipelines=self._pipelines,
            prompts=self._prompts,
            planning=self._planning,
            offers=self._offers,
            expected=PullOffers(shipped_catalogue()).expected,
            hosts=self._hosts,
            loads=self._loads,
            coordinator=self._coordinator,
            alive=self._alive,
            name_of=ground.name_of,
            wall=ground.wall,
        )
        trial_stages = TrialStages(
            calls=self._calls,
            hosts=self._hosts,
            folder=ground.data_dir / "trials",
            can_load=lambda: self._lent.can_load,
            coordinator=self._coordinator,
            offload=ground.offload,
            log=log("llm.trial"),
        )
        methods = {**stage_methods(self._hosts, self._loads, desk, trial_stages), **weight_methods(self._weights)}
        service = LlmService(
            calls=self._calls,
            methods=methods,
            hosts=self._hosts,
            loads=self._loads,
            entries=self._entries,
            generations=self._generations,
            keeper=self._keeper,
            learning=self._learning,
            served=served,
            loaded=self._loaded,
            pinned=self._pinned,
            trials=self._trials,
            trial_stages=trial_stages,
            weights=self._weights,
            pulls=self._pulls,
            client=self._client,
            renderer=self._renderer,
            shipped=SHIPPED,
            log=log("llm"),
        )
        chats = Chats(hub=ground.hub, writer=self._writer, wall=ground.wall)
        routes = llm_routes(
            llm=desk,
            pulls=self._pulls,
            library=Names(shipped_catalogue()),
            chats=chats,
            recording=Recording(llm=desk, chats=chats),
            find_node=ground.find_node,
            me=self._me,
        )
        return Llm(service, desk, self._pulls, chats, methods, Mount(routes), self._observe)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _build_weights(self) -> Weights:
        ground = self._ground
        settings = ground.settings
        return Weights(
            me=self._me,
            records=ModelRecords(me=self._me, reads=ground.hub.records, writes=self._writer),
            store=self._store,
            network=self._calls,
            alive=self._alive,
            client=self._client,
            folder=Path(settings.models_dir) if settings.models_dir else ground.data_dir / "models",
            bytes_max=settings.disk_bytes_max,
            hub=settings.hub_url,
            token=settings.hub_token,
            in_use=self._in_use,
            pinned=lambda digest: self._models.is_pinned(digest),
            may_delete=self._may_delete,
            other_names=shipped_catalogue().names,
            disk=disk_sizes,
            offload=ground.offload,
            wall=ground.wall,
            logger=ground.log("llm.weights"),
        )

    def _build_pulls(self) -> Pulls:
        ground = self._ground
        return Pulls(
            weights=self._weights,
            store=self._store,
            network=self._calls,
            alive=self._alive,
            planner=self._where,
            offers=PullOffers(shipped_catalogue()),
            name_of=ground.name_of,
            client=self._client,
            hub=ground.settings.hub_url,
            token=ground.settings.hub_token,
            offload=ground.offload,
            wall=ground.wall,
            logger=ground.log("llm.pull"),
        )

    def _build_lent(self) -> Lent:
        ground = self._ground
        settings = ground.settings
        stored = ground.key_value.load_all(MACHINE).get(_SPEED)
        return Lent(
            name=lambda: ground.name_of(self._me),
            lends=settings.lend,
            threads=settings.threads,
            memory_bytes_max=settings.memory_bytes_max,
            gpu_bytes_max=settings.gpu_bytes_max,
            loaded_bytes=lambda: self._hosts.loaded_bytes(),
            lent_bytes=lambda: self._hosts.lent_bytes(),
            gpus=ground.gpus,
            rtts=ground.rtts,
            measured=None if stored is None else msgspec.msgpack.decode(stored, type=Measured),
            learnt=lambda: self._learning.told,
        )

    def _build_learning(self) -> Learning:
        ground = self._ground
        stored = ground.key_value.load_all(MACHINE).get(_LEARNT)
        before = NOTHING_LEARNT
        if stored is not None:
            before = msgspec.msgpack.decode(stored, type=Remembered).learnt(self._lent.speed)

        async def remember(learnt: Remembered) -> None:
            await ground.key_value.persist([Persist(MACHINE, _LEARNT, msgspec.msgpack.encode(learnt))])
            self._keeper.hurry()

        return Learning(
            calls=self._calls,
            offers=self._offers,
            shapes=self._shapes,
            speed=lambda: self._lent.speed,
            before=before,
            remember=remember,
        )

    def _build_hosts(self) -> Hosts:
        ground = self._ground

        async def persist(effect: Persist) -> None:
            await ground.key_value.persist([effect])
            ground.fence.persisted([effect])

        async def report(to: NodeId, told: object) -> None:
            await self._calls.call(to, "llm.report", told, bool, timeout_s=REPORT_S)

        async def probe(pipeline: Pipeline) -> None:
            await self._singles.probe(pipeline)

        async def remember(speed: Speed) -> None:
            value = msgspec.msgpack.encode(self._lent.measured(speed))
            await ground.key_value.persist([Persist(MACHINE, _SPEED, value)])
            self._keeper.hurry()

        return Hosts(
            machine=Hosting(me=self._me, fence=ground.fence),
            calls=self._calls,
            weights=self._weights,
            lent=self._lent,
            persist=persist,
            report=report,
            probe=probe,
            remember=remember,
            weight_bytes=lambda model, first, end: weight_bytes(self._shapes, model, first, end),
            architecture=self._shapes.architecture,
            hear=self._learning.hear,
            now=ground.now,
            log=ground.log("llm.stages"),
        )

    def _build_loads(self) -> Loads:
        ground = self._ground
        settings = ground.settings

        async def command(node: NodeId, order: StageCommand) -> str:
            return await self._calls.call(node, "llm.stage", order, str)

        def publish(event: object) -> None:
            self._loaded.observe(event)
            ground.publish(event)

        return Loads(
            machine=LoadingMachine(
                me=self._me,
                rng=random.SystemRandom(),
                params=LoadingParameters(slots=settings.slots, keep_alive_s=settings.keep_alive_s),
            ),
            planning=self._planning,
            shapes=self._shapes,
            command=command,
            may_unload=self._may_delete,
            test=lambda wanted: self._trials.want(wanted),
            publish=publish,
            now=ground.now,
            log=ground.log("llm.loads"),
        )

    # ---- what parts ask of each other -------------------------------------------------------------------------------

    def _alive(self) -> list[NodeId]:
        return sorted(self._ground.hub.membership.view.up)

    def _coordinator(self) -> NodeId | None:
        return self._ground.hub.election.coordinator

    def _may_delete(self, peer: NodeId) -> None:
        hub = self._ground.hub
        denied = authority.may_delete_models(hub.roster, hub.policy, peer)
        if denied is not None:
            raise MeshError(ErrorCode(denied.code), denied.message, retryable=denied.retryable)

    def _in_use(self, digest: str) -> bool:
        return any(host.pipeline.model == digest for host in self._hosts.stages.values())

    def _where(self, manifest: Manifest) -> Sequence[tuple[NodeId, int, int]]:
        """Which node needs which layers of a model that is pulled. Raises MeshError where it fits nowhere."""
        context = min(manifest.shape.context_max, self._ground.settings.context or CONTEXT_DEFAULT)
        made = self._planning.now(manifest.digest, context)
        if isinstance(made, Refusal):
            raise MeshError(ErrorCode.UNAVAILABLE, made.words)
        return [(stage.node, stage.first, stage.end) for stage in made.stages]

    async def _ensure(self, request: EnsureRequest) -> Answer:
        leader = self._coordinator()
        if self._me not in self._ground.hub.roster:
            raise MeshError(
                ErrorCode.EVICTED, "This node is no member of its mesh any more. `meshnode status` says what to do."
            )
        if leader is None:
            raise MeshError(ErrorCode.UNAVAILABLE, "No coordinator is known at the moment. Try again.", retryable=True)
        returns: Any = Answer  # a union, which no type of a type can say
        answer: Answer = await self._calls.call(leader, "llm.ensure", request, returns, timeout_s=ENSURE_S)
        return answer

    def _observe(self, event: object) -> None:
        self._writer.observe(event)
        match event:
            case CoordinatorChanged():
                self._hosts.submit(event)
                self._loads.submit(event)
                self._loads.submit(MembersUp(frozenset(self._alive())))
                self._pinned.changed()
            case PeerUp():
                self._pinned.changed()
            case PeerDown() | PeerLeft():
                self._loads.submit(event)
                self._pipelines.peer_gone(event)
                self._generations.peer_gone(event)
