"""The collections of records that models need. What they hold, and who may write it, is said by those who use them."""

from meshnode.llm.service.chats import chats_collection
from meshnode.llm.service.loaded import loaded_collection
from meshnode.llm.service.offering import offers_collection
from meshnode.llm.service.served import served_collection
from meshnode.llm.service.trials import selftests_collection
from meshnode.llm.service.weights.records import model_collections
from protocol.records.collection import Collection


def llm_collections() -> list[Collection]:
    """All of them."""
    return [
        chats_collection(),
        offers_collection(),
        served_collection(),
        loaded_collection(),
        selftests_collection(),
        *model_collections(),
    ]
