"""What peers may ask about stages: wishes, commands, reports, streams, tokens."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from meshnode.kernel.calls import Granted
from meshnode.kernel.links.contracts import PeerMethod
from meshnode.llm.model import SessionReport, StageReport
from meshnode.llm.service.calls import Attach
from meshnode.llm.service.desk import Desk, SessionsRequest, UnloadRequest
from meshnode.llm.service.forwarding import EMBED, FORWARD, EmbedRequest, ForwardRequest
from meshnode.llm.service.hosts import Hosts
from meshnode.llm.service.learning import StatsRequest
from meshnode.llm.service.loads import Loads
from meshnode.llm.service.prompts import Tokenised, TokeniseRequest
from meshnode.llm.service.trialstages import TrialEnd, TrialStage, TrialStages
from protocol.ids import NodeId
from protocol.sharding.pipelines import Answer, EnsureRequest, NodeReport, Reported, StageCommand

Handler = Callable[[NodeId, Any], Awaitable[object]]


def stage_methods(hosts: Hosts, loads: Loads, desk: Desk, trials: TrialStages) -> Mapping[str, PeerMethod[Any]]:
    """The methods by name."""

    async def ensure(peer: NodeId, request: EnsureRequest) -> Answer:
        return await loads.ensure(peer, request)

    async def stage(peer: NodeId, command: StageCommand) -> str:
        return await hosts.command(peer, command)

    async def report(peer: NodeId, told: NodeReport) -> bool:
        loads.submit(Reported(peer, told))
        return True

    async def attach(peer: NodeId, wanted: Attach) -> Granted:
        return hosts.attach(peer, wanted)

    async def tokenise(peer: NodeId, wanted: TokeniseRequest) -> Tokenised:
        engine = hosts.engine(wanted.pipeline)
        tokens = await engine.tokenise(
            wanted.text, add_special=wanted.add_special, parse_special=wanted.parse_special, quoted=wanted.quoted
        )
        return Tokenised(tokens)

    async def stats(peer: NodeId, wanted: StatsRequest) -> StageReport:
        return desk.stage_stats(wanted.pipeline)

    async def sessions(peer: NodeId, wanted: SessionsRequest) -> list[SessionReport]:
        return await desk.own_sessions()

    async def unload(peer: NodeId, wanted: UnloadRequest) -> bool:
        return loads.unload_for(peer, wanted.digest)

    async def trial(peer: NodeId, wanted: TrialStage) -> str:
        return await trials.begin(peer, wanted)

    async def trial_end(peer: NodeId, wanted: TrialEnd) -> str:
        return await trials.end(wanted.pipeline)

    return {
        "llm.trial": PeerMethod(TrialStage, trial),
        "llm.trial_end": PeerMethod(TrialEnd, trial_end),
        "llm.stats": PeerMethod(StatsRequest, stats),
        "llm.sessions": PeerMethod(SessionsRequest, sessions),
        "llm.unload": PeerMethod(UnloadRequest, unload),
        FORWARD: PeerMethod(ForwardRequest, desk.forwarding.forward_for),
        EMBED: PeerMethod(EmbedRequest, desk.forwarding.embed_for),
        "llm.ensure": PeerMethod(EnsureRequest, ensure),
        "llm.stage": PeerMethod(StageCommand, stage),
        "llm.report": PeerMethod(NodeReport, report),
        "llm.attach": PeerMethod(Attach, attach),
        "llm.tokenise": PeerMethod(TokeniseRequest, tokenise),
    }
