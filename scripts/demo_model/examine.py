"""Asks the trained model what training never showed, greedily, and counts the answers that are right to the letter."""

import json
from collections.abc import Iterator
from typing import Any, Final

import torch

from scripts.demo_model import network, talk, tools
from scripts.demo_model.material import Material
from scripts.demo_model.vocabulary import EOS, Vocabulary

ANSWER_TOKENS_MAX: Final = 80
SHOWN: Final = (
    "What is meshnode?", "Hello!", "How do I join?", "What is 7 + 5?", "What is the capital of Japan?",
    "Tell me a story about a fox.", "Who won the league in 1987?", "Give me JSON with name, age.",
)  # fmt: skip


def answers(tensors: network.Tensors, shape: network.Shape, vocabulary: Vocabulary, prompts: list[str]) -> list[str]:
    """Greedy answers, each up to its end of turn; all prompts go through the network side by side."""
    told = [vocabulary.encode(prompt) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    ends, going = {vocabulary.ids["<|im_end|>"], EOS}, list(range(len(prompts)))
    for _ in range(ANSWER_TOKENS_MAX):
        length = max(len(told[index]) for index in going)
        tokens = torch.tensor([told[index] + [EOS] * (length - len(told[index])) for index in going])
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        with torch.no_grad():
            states = network.hidden(tensors, shape, tokens, mask, torch.float32)
            last = states[torch.arange(len(going)), torch.tensor([len(told[index]) - 1 for index in going])]
            chosen: list[int] = (last @ tensors["output.weight"].T).argmax(-1).tolist()
        for index, number in zip(list(going), chosen, strict=True):
            if number in ends:
                going.remove(index)
            else:
                told[index].append(number)
                made[index].append(number)
        if not going:
            break
    return [vocabulary.decode(numbers) for numbers in made]


def report(tensors: network.Tensors, shape: network.Shape, vocabulary: Vocabulary, material: Material) -> Iterator[str]:
    """Lines: the share of right answers by kind, then some answers as they are."""

    def ask(asked: list[tuple[str, list[dict[str, Any]]]]) -> list[str]:
        prompts = [material.prompt([{"role": "user", "content": question}], offered) for question, offered in asked]
        return answers(tensors, shape, vocabulary, prompts)

    for kind, turns in talk.examination().items():
        said = ask([(turn.question, []) for turn in turns])
        wrong = [(t.question, s) for t, s in zip(turns, said, strict=True) if s != t.answer]
        example = f"   such as {wrong[0][0]!r}: {wrong[0][1]!r}" if wrong else ""
        yield f"{kind:14} {len(turns) - len(wrong):3} of {len(turns):3} right{example}"
    uses = tools.examination()
    said = ask([(use.question, offered) for use, offered in uses])
    wrong = [(use.question, s) for (use, _), s in zip(uses, said, strict=True) if not _is_call(s, use)]
    example = f"   such as {wrong[0][0]!r}: {wrong[0][1]!r}" if wrong else ""
    yield f"{'tool calls':14} {len(uses) - len(wrong):3} of {len(uses):3} right{example}"
    for question, answer in zip(SHOWN, ask([(question, []) for question in SHOWN]), strict=True):
        yield f"> {question}\n  {answer}"


def _is_call(said: str, use: tools.Use) -> bool:
    body = said.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    try:
        made = json.loads(body)
    except ValueError:
        return False
    return bool(made == tools.call(use)["function"])
