"""What the command line says of models that cannot answer yet: not pulled, or pinned and not loaded."""

from tests.cli.answers import PEER, node, peer
from tests.cli.conftest import Command
from tests.cli.fake_agent import Answer, FakeAgent, refusal
from tests.cli.test_llm import ABSENT, CHAT, MODELS, NODES, PLAN, model, models

__all__ = ["models"]


def test_a_model_that_can_be_pulled_is_named_with_its_size_and_whether_it_fits(
    models: FakeAgent, command: Command
) -> None:
    models.on("GET /api/llm/catalogue?plan=false&limit=500", Answer([ABSENT]))
    models.on(CHAT, refusal(404, "not_found", "No node has the model."))
    for plan, words in (
        (PLAN, "It has 2.0 GiB, and would run on one node. Fetch it first:\n  meshnode pull absent"),
        (PLAN | {"fits": False, "plans": [], "reason": "It lacks 3 GiB."}, "would not fit. It lacks 3 GiB."),
    ):
        models.on("GET /api/llm/plan?model=absent", Answer(plan))
        for asked in (["chat", "absent"], ["ask", "--model", "absent", "hi"]):
            done = command(*asked)
            assert done.code == 1
            assert words in done.err
    assert "No node has the model." in command("ask", "--model", "nothing", "hi").err


def test_why_a_pinned_model_is_not_loaded_stands_below_the_list(command: Command, agent: FakeAgent) -> None:
    agent.on(NODES, Answer([node(), peer()]))
    pinned = model(ollama_ready=False, pinned=True, state="failed", reason="attic: out of memory")
    agent.on(MODELS, Answer([pinned]))
    done = command("models")
    assert (done.code, done.out.splitlines()[-1]) == (0, f"{pinned['model']}: attic: out of memory")
    assert "failed" in done.out.splitlines()[1]


def test_what_versions_mean_stands_below_the_list_with_its_mending(command: Command, agent: FakeAgent) -> None:
    agent.on(NODES, Answer([node(), peer()]))
    agent.on(MODELS, Answer([model()]))
    apart = {"effect": "apart", "message": "they differ", "outdated": [PEER], "update_to": "0.3.36"}
    shared = {"effect": "shared", "message": "these share", "outdated": [], "update_to": ""}
    agent.on("GET /api/llm/status?scope=local", Answer({"versions": [apart, shared]}))
    assert command("models").out.splitlines()[-3:] == [
        "they differ",
        "  -> on attic: pipx runpip meshnode install llama-cpp-python==0.3.36, and start the agent again",
        "these share",
    ]
