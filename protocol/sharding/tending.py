"""The life of a pipeline at its coordinator: planned, loaded, probed, watched by reports, broken, replaced, let go."""

from typing import Final

from protocol.effects import Publish
from protocol.ids import NodeId
from protocol.sharding.held import Held, Load, LoadingState, Stray, is_ready, sizes, stands
from protocol.sharding.pipelines import (
    FEW_NODES,
    LOAD_WORDS_CHARS_MAX,
    NO_ENGINE,
    PIPELINE_ID_BYTES,
    EnsureRequest,
    LoadFailed,
    LoadStage,
    Pipeline,
    PipelineLost,
    PipelineReady,
    Planned,
    PlanWanted,
    ProbePipeline,
    Refused,
    Reported,
    Span,
    StageReport,
)

COMPLAINTS_MAX: Final = 2  # a third one within `trust_s` is believed, whatever the probes say


class Tending:
    """One part of the loading machine; see the module."""

    def __init__(self, state: LoadingState) -> None:
        self._s = state
        self._job = 0
        self._probe = 0

    # ---- a load ------------------------------------------------------------------------------------------------------

    def begin(self, request: EnsureRequest, now: float) -> None:
        without = frozenset(NodeId(node) for node in request.without)
        context = max(
            (ask.request.context for ask in self._s.asks.values() if ask.request.model == request.model),
            default=request.context,
        )
        load = Load(request.model, context, without, request.stages_min, 0, now, now, engine=request.engine)
        self._s.loads[request.model] = load
        load.replaces = self._remains(load, now)
        self._plan(load, now)

    def _remains(self, load: Load, now: float) -> bytes | None:
        """A pipeline of the model that broke under another coordinator: its engines can be taken over."""
        for name, stray in self._s.strays.items():
            pipeline = stray.report.pipeline
            held = Held(pipeline, "unloading", now, now, now, dict(stray.nodes), dict.fromkeys(stray.nodes, now))
            sizes_fit = pipeline.context == load.context and pipeline.slots == self._s.params.slots
            if pipeline.model == load.model and sizes_fit and any(stands(held, node) for node in stray.nodes):
                del self._s.strays[name]
                self._s.held[name] = held
                return name
        return None

    def _plan(self, load: Load, now: float) -> None:
        self._job += 1
        load.job, load.planned_at = self._job, now
        load.pipeline, load.layout = None, None
        load.words = load.words if load.again_at else "planning"
        load.again_at = 0.0
        freed = [held for name in (*load.freed, load.replaces) if name and (held := self._s.held.get(name))]
        taken = [
            held for held in self._s.held.values() if held.state == "loading" and held.pipeline.model != load.model
        ]
        old = self._s.held.get(load.replaces) if load.replaces else None
        kept: tuple[Span, ...] = ()
        avoided = load.without | load.lost | self._s.silent
        if old is not None and not old.pipeline.engine and not load.engine:
            kept = tuple(
                span for span in old.pipeline.stages if stands(old, NodeId(span.node)) and span.node not in avoided
            )
        wanted = PlanWanted(
            load.job, load.model, load.context, avoided, sizes(freed), sizes(taken), kept, load.stages_min, load.engine
        )
        self._s.out.append(wanted)

    def planned(self, event: Planned, now: float) -> None:
        load = next((load for load in self._s.loads.values() if load.job == event.job), None)
        if load is None or load.pipeline is not None or load.layout is not None:
            return
        if event.plan is not None and len(event.plan.stages) < load.stages_min and not load.mends:
            # Loading it would serve nobody: whoever wants more stages would have it loaded again and again.
            words = f"It can be split over {len(event.plan.stages)} nodes here, not over {load.stages_min}."
            self.give_up(load, FEW_NODES, words, now)
            return
        if event.plan is not None:
            load.stages_min = min(load.stages_min, len(event.plan.stages))
            load.layout = event.plan
            load.words = event.plan.words[:LOAD_WORDS_CHARS_MAX]
            nodes = {span.node for span in event.plan.stages}
            for name in load.freed:
                held = self._s.held.get(name)
                if held is not None and nodes.intersection(held.pipeline.nodes):
                    self.lose(held, f"it made room for {load.model}", now)
            self._place(load, now)
            return
        if event.code == FEW_NODES and load.mends and load.stages_min > 1:
            load.stages_min -= 1
            self._plan(load, now)
            return
        if event.code in (FEW_NODES, NO_ENGINE) and load.mends and load.engine:
            load.engine = ""
            self._plan(load, now)
            return
        idle = [held for held in self._s.held.values() if self.may_evict(held) and held.pipeline.id not in load.freed]
        if event.code == "no_memory" and idle:
            load.freed.append(min(idle, key=lambda held: (held.used_at, held.pipeline.id)).pipeline.id)
            self._plan(load, now)
        elif event.code == "untested" and now - load.begun_at < self._s.params.tests_s:
            load.again_at = now + self._s.params.again_s
            load.words = event.words[:LOAD_WORDS_CHARS_MAX]
        elif event.code == "no_memory" and self._s.strays and load.strayed_tries < self._s.params.strayed_tries_max:
            load.strayed_tries += 1
            load.again_at = now + self._s.params.again_s
            load.words = "waiting for stages that nobody needs to be unloaded"
        else:
            self.give_up(load, event.code, event.words, now, short_bytes=event.short_bytes)

    def may_evict(self, held: Held) -> bool:
        return held.state == "ready" and not held.active and held.pipeline.model not in self._s.pinned

    def _place(self, load: Load, now: float) -> None:
        """Command the stages as soon as nothing that the plan counts as gone is still there."""
        layout = load.layout
        assert layout is not None  # the caller has just planned
        nodes = {span.node for span in layout.stages}
        in_the_way = [
            held
            for held in self._s.held.values()
            if held.state == "unloading" and held.pipeline.id != load.replaces and nodes.intersection(held.reports)
        ]
        if in_the_way:
            return
        if len(self._s.held) >= self._s.params.pipelines_max:
            self.give_up(load, "overloaded", f"{len(self._s.held)} pipelines are loaded already.", now)
            return
        name = self._s.rng.getrandbits(8 * PIPELINE_ID_BYTES).to_bytes(PIPELINE_ID_BYTES, "little")
        slots = self._s.params.slots
        pipeline = Pipeline(name, load.model, load.context, slots, layout.stages, layout.vocabulary, layout.engine)
        if not pipeline.is_sound():
            self.give_up(load, "internal", "the plan is no chain of layers", now)
            return
        load.pipeline = name
        self._s.held[name] = Held(
            pipeline,
            "loading",
            now,
            now,
            now,
            heard=dict.fromkeys(pipeline.nodes, now),
            stages_min=load.stages_min,
            engine=load.engine,
        )
        old = self._s.held.get(load.replaces) if load.replaces else None
        for node in pipeline.nodes:
            takes_over = old is not None and node in old.pipeline.nodes
            self._s.command(node, LoadStage(pipeline, load.replaces if takes_over else None))
        if old is not None:
            old.replaced_by = name
            for node in set(old.reports) - set(pipeline.nodes):
                self._s.unload(old, node, now)

    def give_up(self, load: Load, code: str, words: str, now: float, *, short_bytes: int = 0) -> None:
        """End a load; all who wait for it hear why."""
        del self._s.loads[load.model]
        if load.pipeline is not None and load.pipeline in self._s.held:
            self.lose(self._s.held[load.pipeline], words, now)
        self._release_old(load, now)
        refused = Refused(
            code[:32],
            words[:LOAD_WORDS_CHARS_MAX],
            code not in ("no_memory", "too_long", "uncut", NO_ENGINE),
            short_bytes,
        )
        for ask in [ask for ask, asked in self._s.asks.items() if asked.request.model == load.model]:
            self._s.answer(ask, refused)
        self._s.out.append(Publish(LoadFailed(load.model, code, words)))

    def _release_old(self, load: Load, now: float) -> None:
        """What a load meant to take over is let go of: the load is over."""
        old = self._s.held.get(load.replaces) if load.replaces else None
        if old is not None:
            for node in list(old.reports):
                self._s.unload(old, node, now)
        load.replaces = None

    def look_after_load(self, load: Load, now: float) -> None:
        """Plan again where that was put off; end a load of which nothing came."""
        if 0.0 < load.again_at <= now:
            self._plan(load, now)
        elif load.pipeline is None and now - load.planned_at > self._s.params.plan_s + self._s.params.unload_s:
            self.give_up(load, "timeout", f"{load.words}: nothing came of it", now)

    # ---- reports -----------------------------------------------------------------------------------------------------

    def reported(self, event: Reported, now: float) -> None:
        (self._s.pressed.add if event.report.pressed else self._s.pressed.discard)(event.node)
        self._s.silent.discard(event.node)
        told = {report.pipeline.id: report for report in event.report.stages}
        for name, report in told.items():
            held = self._s.held.get(name)
            if event.node not in report.pipeline.nodes or not report.pipeline.is_sound():
                continue
            if held is None:
                self._strayed(event.node, report, now)
            elif held.pipeline == report.pipeline:
                self._heard(held, event.node, report, now)
        for held in list(self._s.held.values()):
            if event.node in held.pipeline.nodes and held.pipeline.id not in told:
                self._missing(held, event.node, now)

    def _heard(self, held: Held, node: NodeId, report: StageReport, now: float) -> None:
        before = held.reports.get(node)
        held.reports[node] = report
        held.heard[node] = now
        if before is None or (before.state, before.share) != (report.state, report.share):
            held.moved_at = now
        if held.state == "unloading":
            if held.replaced_by is None and not self._is_kept(held):
                self._s.unload(held, node, now)
            return
        if report.active:
            held.used_at = now
        elif node == held.pipeline.first:
            held.used_at = max(held.used_at, now - report.idle_s)
        if report.state in ("broken", "unloading"):
            blamed = report.blamed
            guilty = held.pipeline.nodes[blamed] if blamed is not None and blamed < len(held.pipeline.stages) else node
            if guilty != node:
                self._s.silent.add(guilty)
            self.lose(held, f"{guilty}: {report.words or report.state}", now, guilty=guilty)
        elif held.state == "loading" and self._all(held, "ready"):
            self._probe_it(held, self._s.params.probe_s, now)
        elif held.state == "probing" and report.probed == held.probe and node == held.pipeline.first:
            self._probed(held, report, now)

    def _missing(self, held: Held, node: NodeId, now: float) -> None:
        """A whole report of a stage's node says nothing of it."""
        was = held.reports.pop(node, None)
        if held.state == "unloading":
            self._bury(held, now)
        elif was is not None:
            self.lose(held, f"{node} does not hold its stage any more", now)
        elif now - held.since > self._s.params.unheard_s:
            self.lose(held, f"{node} never began to load its stage", now, guilty=node)

    def _all(self, held: Held, state: str) -> bool:
        return all(node in held.reports and held.reports[node].state == state for node in held.pipeline.nodes)

    def _probe_it(self, held: Held, within_s: float, now: float) -> None:
        self._probe += 1
        held.state = "probing"
        held.probe, held.probe_due = self._probe, now + within_s
        self._s.command(held.pipeline.first, ProbePipeline(held.pipeline.id, self._probe))

    def _probed(self, held: Held, report: StageReport, now: float) -> None:
        if not report.probed_ok:
            self.lose(held, f"its probe failed: {report.words}", now)
            return
        held.state, held.moved_at = "ready", now
        if not held.ever_ready:
            held.ever_ready, held.used_at = True, now
            self._s.out.append(Publish(PipelineReady(held.pipeline)))
        load = self._s.loads.get(held.pipeline.model)
        if load is not None and load.pipeline == held.pipeline.id:
            del self._s.loads[load.model]

    def complained(self, held: Held, words: str, now: float) -> None:
        """A session says that a pipeline failed it. Look for oneself; whoever insists is believed."""
        if held.state != "ready":
            return
        held.complaints = [at for at in held.complaints if now - at < self._s.params.trust_s][-8:]
        held.complaints.append(now)
        if len(held.complaints) > COMPLAINTS_MAX:
            self.lose(held, f"it failed sessions three times: {words}", now)
        else:
            self._probe_it(held, self._s.params.complaint_probe_s, now)

    # ---- what a coordinator finds ------------------------------------------------------------------------------------

    def _strayed(self, node: NodeId, report: StageReport, now: float) -> None:
        """A stage of a pipeline that is not this coordinator's: adopted when all its stages are there."""
        if len(self._s.strays) >= self._s.params.pipelines_max and report.pipeline.id not in self._s.strays:
            return
        stray = self._s.strays.setdefault(report.pipeline.id, Stray(report, {}, now))
        if stray.report.pipeline != report.pipeline:
            return
        stray.nodes[node] = report
        nodes = report.pipeline.nodes
        if set(stray.nodes) != set(nodes) or len(self._s.held) >= self._s.params.pipelines_max:
            return
        states = {each.state for each in stray.nodes.values()}
        model = report.pipeline.model
        if not states <= {"ready", "loading"} or ("loading" in states and model in self._s.loads):
            return
        del self._s.strays[report.pipeline.id]
        held = Held(report.pipeline, "loading", now, now, now, dict(stray.nodes), dict.fromkeys(nodes, now))
        self._s.held[report.pipeline.id] = held
        if "loading" in states:
            load = Load(model, report.pipeline.context, frozenset(), 1, 0, now, now, pipeline=report.pipeline.id)
            self._s.loads[model] = load
        else:
            self._probe_it(held, self._s.params.probe_s, now)

    # ---- endings -----------------------------------------------------------------------------------------------------

    def lost(self, node: NodeId, now: float) -> None:
        """A node is down or left: with it goes every stage that it held."""
        self._s.pressed.discard(node)
        self._s.silent.discard(node)
        for held in list(self._s.held.values()):
            if node in held.pipeline.nodes:
                held.reports.pop(node, None)
                if held.state == "unloading":
                    self._bury(held, now)
                else:
                    self.lose(held, f"{node} is gone", now, guilty=node)
        for stray in self._s.strays.values():
            stray.nodes.pop(node, None)
        for load in list(self._s.loads.values()):
            if load.layout is not None and load.pipeline is None and node in {s.node for s in load.layout.stages}:
                load.lost.add(node)
                self._plan(load, now)

    def command_failed(self, node: NodeId, pipeline: bytes, words: str, now: float) -> None:
        held = self._s.held.get(pipeline)
        if held is not None and held.state == "loading":
            self.lose(held, f"{node} did not take its stage: {words}", now, guilty=node)
        elif held is not None and held.state == "probing":
            self.lose(held, f"{node} could not probe: {words}", now)

    def lose(self, held: Held, words: str, now: float, *, guilty: NodeId | None = None) -> None:
        """This pipeline is no more. If it was being loaded, or is wanted, another is planned around what stands."""
        if held.state == "unloading":
            return
        was_ready = held.ever_ready
        held.state, held.broken, held.since = "unloading", words, now
        self._s.out.append(Publish(PipelineLost(held.pipeline.id, held.pipeline.model, words[:LOAD_WORDS_CHARS_MAX])))
        load = self._s.loads.get(held.pipeline.model)
        mine = load is not None and load.pipeline == held.pipeline.id
        if load is None and was_ready and guilty is not None:
            # Sessions are on it, and ask for another in a moment: begin while the survivors' engines still stand.
            was = held.pipeline
            load = Load(was.model, was.context, frozenset(), held.stages_min, 0, now, now)
            load.engine, load.mends = held.engine, True
            self._s.loads[load.model] = load
            mine = True
        if load is not None and mine:
            load.tries += 1
            if guilty is not None:
                load.lost.add(guilty)
            if load.tries > self._s.params.tries_max:
                load.pipeline = None
                self._s.unload_all(held, now)
                self.give_up(load, "unavailable", f"Loading failed {load.tries} times; the last time: {words}", now)
                return
            self._release_old(load, now)
            load.replaces = held.pipeline.id if guilty is not None else None
            self._plan(load, now)
        if load is None or load.replaces != held.pipeline.id:
            self._s.unload_all(held, now)
        self._bury(held, now)

    def _is_kept(self, held: Held) -> bool:
        """Whether a load means to take its engines over."""
        return any(load.replaces == held.pipeline.id and load.pipeline is None for load in self._s.loads.values())

    def _bury(self, held: Held, now: float) -> None:
        """Forget a pipeline of which nothing is left, and go on with the loads that waited for its memory."""
        if held.state != "unloading" or held.reports or self._is_kept(held):
            return
        self._s.held.pop(held.pipeline.id, None)
        for load in list(self._s.loads.values()):
            if load.layout is not None and load.pipeline is None:
                self._place(load, now)

    def look_after(self, held: Held, now: float) -> None:
        params = self._s.params
        match held.state:
            case "loading" if now - held.moved_at > params.stuck_s:
                slow = [node for node in held.pipeline.nodes if not is_ready(held, node)]
                self.lose(held, f"{', '.join(slow)}: no progress for {params.stuck_s:.0f} s", now, guilty=slow[0])
            case "probing" if now >= held.probe_due:
                self.lose(held, "its probe gave no token in time", now)
            case "ready" if not held.active and held.pipeline.model not in self._s.pinned:
                if now - held.used_at > params.keep_alive_s:
                    self.lose(held, f"nobody used it for {params.keep_alive_s:.0f} s", now)
            case "unloading":
                if now - held.since > params.unload_s:
                    # Whoever still has a stage of it reports so, and it is told again as of an orphan.
                    held.reports.clear()
                self._bury(held, now)
        if held.state in ("loading", "probing", "ready"):
            silent = [node for node in held.pipeline.nodes if now - held.heard.get(node, now) > params.unheard_s]
            if silent:
                self.lose(held, f"{silent[0]} reports nothing", now, guilty=silent[0])
