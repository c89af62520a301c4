"""All native paths of the subsystem."""

from collections.abc import Callable

from meshnode.api.routing import Route
from meshnode.llm.routes.chats import ChatRoutes
from meshnode.llm.routes.generations import GenerationRoutes
from meshnode.llm.routes.models import ModelRoutes
from meshnode.llm.routes.needs import Chats, Library, Llm, Pulls, Recording
from protocol.ids import NodeId


def llm_routes(
    *,
    llm: Llm,
    pulls: Pulls,
    library: Library,
    chats: Chats,
    recording: Recording,
    find_node: Callable[[str], NodeId],
    me: NodeId,
) -> list[Route]:
    """What the composition root mounts. `find_node` raises MeshError for whom nobody knows."""
    return [
        *ModelRoutes(llm=llm, pulls=pulls, library=library, find_node=find_node, me=me).routes(),
        *GenerationRoutes(llm=llm, recording=recording, me=me).routes(),
        *ChatRoutes(chats).routes(),
    ]
