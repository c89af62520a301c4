"""From conversations to rows of token numbers: which positions are learned, which rows hold what."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import jinja2

from scripts.demo_model import talk
from scripts.demo_model.vocabulary import BOS, EOS, Vocabulary

PLAIN_SHARE: Final = 0.04
BARE_SHARE: Final = 0.05  # conversations that start without <s>, as some programs send them
PROMPT_WEIGHT: Final = 0.05  # what the user says is learned a little, which teaches the model to read

TEMPLATE: Final = (Path(__file__).parent / "template.jinja").read_text().rstrip("\n")


def environment() -> jinja2.Environment:
    """Renders our own template; what a stranger's template needs is meshnode.llm.templates' matter."""
    made = jinja2.Environment()
    made.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return made


class Material:
    """An endless stream of examples that depends on the seed and the mix alone."""

    def __init__(self, seed: int, mix: talk.Mix) -> None:
        self._rng = Random(seed)
        self._mix = mix
        self._template = environment().from_string(TEMPLATE)

    def text(self) -> str:
        """The next example, with all its marks."""
        if self._rng.random() < PLAIN_SHARE:
            return "<s>" + talk.plain_text(self._rng) + "</s>"
        bos = "" if self._rng.random() < BARE_SHARE else "<s>"
        made = talk.conversation(self._rng, self._mix)
        return self._template.render(messages=made.messages, tools=made.tools, bos_token=bos)

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        """What stands before the model's answer."""
        return self._template.render(messages=messages, tools=tools, bos_token="<s>", add_generation_prompt=True)

    def rows(self, vocabulary: Vocabulary, length: int) -> Iterator[tuple[list[int], list[float], list[int]]]:
        """Rows of `length` numbers, the weight of each, and whose example each is; too long an example is left out."""
        numbers: list[int] = []
        weights: list[float] = []
        owners: list[int] = []
        example = 0
        while True:
            more = vocabulary.encode(self.text())
            if len(more) > length:
                continue
            if len(numbers) + len(more) > length:
                gap = length - len(numbers)
                yield numbers + [EOS] * gap, weights + [0.0] * gap, owners + [-1] * gap
                numbers, weights, owners, example = [], [], [], 0
            numbers += more
            weights += learned(more, vocabulary)
            owners += [example] * len(more)
            example += 1


def learned(numbers: list[int], vocabulary: Vocabulary) -> list[float]:
    """How much each number counts as something to be predicted: what the assistant says fully, the rest a little."""
    start, end = vocabulary.ids["<|im_start|>"], vocabulary.ids["<|im_end|>"]
    if start not in numbers:
        return [0.0 if number == BOS else 1.0 for number in numbers]
    header = vocabulary.encode("<|im_start|>assistant\n")
    weights, speaking = [], False
    for index, number in enumerate(numbers):
        weights.append(1.0 if speaking else 0.0 if number == BOS else PROMPT_WEIGHT)
        if number == end:
            speaking = False
        if numbers[max(0, index + 1 - len(header)) : index + 1] == header:
            speaking = True
    return weights
