"""Trains the model that ships with meshnode, on text that scripts/demo_model makes, and writes it as GGUF.

    pip install torch==2.13.0 gguf==0.19.0 jinja2==3.1.6     (in an environment of its own: no part of meshnode)
    python -m scripts.train_demo_model meshnode/llm/data/meshnode-demo.gguf

Two lessons: the first teaches what it knows, the second to read what it is told (tools, JSON, repetitions). The second
goes on from the file that the first wrote, so that it can also be given alone (`--lesson 2`).

Seeds, the order of the examples and the number of threads are fixed, so the same processor type with the same torch
gives the same bytes; the file's SHA-256 is printed. Another processor type sums in another order, and gives a model
that differs in its last digits and therefore in its bytes. The text, the vocabulary and the examination are the same
everywhere. It takes 25 minutes on one idle core with bfloat16 matrix units.
"""

import argparse
import hashlib
import math
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional

from scripts.demo_model import examine, gguf_file, network, talk
from scripts.demo_model.material import Material
from scripts.demo_model.vocabulary import Vocabulary, learn

SEED: Final = 20
THREADS: Final = 1
ROWS: Final = 8
LENGTH: Final = 256
VOCABULARY_EXAMPLES: Final = 8000
MATRIX_RATE: Final = 0.02
OTHER_RATE: Final = 0.004
DECAY: Final = 0.02
WARM_UP: Final = 0.02  # share of the steps in which the rates rise, and in which they fall at the end
COOL_DOWN: Final = 0.5


class Lesson(NamedTuple):
    """What is taught, for how long, and how fast; `rate` scales both learning rates."""

    mix: talk.Mix
    steps: int
    seed: int
    rate: float


LESSONS: Final = (
    Lesson(talk.FIRST, steps=2000, seed=SEED + 1, rate=1.0),
    Lesson(talk.SECOND, steps=800, seed=SEED + 3, rate=0.5),
)


def rate_at(step: int, steps: int) -> float:
    """The share of the full learning rates: a quick rise, a plateau, a straight fall."""
    share = step / steps
    return min(1.0, share / WARM_UP, max(0.0, (1 - share) / COOL_DOWN))


def batch(rows: Any) -> tuple[Any, Any, Any]:
    """Tokens (rows, length), weights alike, and the mask (rows, 1, length, length): backwards, within one example."""
    drawn = [next(rows) for _ in range(ROWS)]
    tokens, weights, owners = (torch.tensor([row[part] for row in drawn]) for part in range(3))
    same = owners[:, :, None] == owners[:, None, :]
    return tokens, weights, (same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None]


def loss_of(tensors: network.Tensors, shape: network.Shape, drawn: tuple[Any, Any, Any]) -> Any:
    """Cross entropy of the next token, weighted. The last token of an example predicts nothing."""
    tokens, weights, mask = drawn
    states = network.hidden(tensors, shape, tokens, mask, torch.bfloat16)[:, :-1]
    follows = mask[:, 0].diagonal(offset=-1, dim1=1, dim2=2)
    counted = weights[:, 1:] * follows
    picked = counted > 0
    logits = (states[picked] @ tensors["output.weight"].to(states.dtype).T).float()
    losses = functional.cross_entropy(logits, tokens[:, 1:][picked], reduction="none")
    return (losses * counted[picked]).sum() / counted.sum()


def train(vocabulary: Vocabulary, tensors: network.Tensors, shape: network.Shape, lesson: Lesson, log: Any) -> None:
    """One lesson; 2,048 tokens a step. Changes the tensors."""
    inner = {name: t for name, t in tensors.items() if t.ndim == 2 and name.startswith("blk.")}
    muon = network.Muon(inner)
    adam = torch.optim.Adam([t for name, t in tensors.items() if name not in inner], lr=OTHER_RATE, betas=(0.9, 0.95))
    rows = Material(lesson.seed, lesson.mix).rows(vocabulary, LENGTH)
    begun, mean = time.monotonic(), 0.0
    for step in range(lesson.steps):
        loss = loss_of(tensors, shape, batch(rows))
        loss.backward()
        rate = rate_at(step + 1, lesson.steps) * lesson.rate
        adam.param_groups[0]["lr"] = OTHER_RATE * rate
        with torch.no_grad():
            muon.step(MATRIX_RATE * rate, DECAY, torch.bfloat16)
        adam.step()
        for tensor in tensors.values():
            tensor.grad = None
        mean += (loss.item() - mean) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            log(f"step {step + 1:5} of {lesson.steps}, loss {mean:.4f}, {time.monotonic() - begun:6.0f} s")


def main() -> None:
    """Trains, writes, examines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--lesson", type=int, choices=range(1, len(LESSONS) + 1), help="only this one")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)

    def log(line: str) -> None:
        print(line, flush=True)

    log(f"torch {torch.__version__}, {THREADS} thread(s), seed {SEED}")
    for number, lesson in enumerate(LESSONS, start=1):
        if options.lesson not in (None, number):
            continue
        if number == 1:
            source = Material(SEED, talk.FIRST)
            vocabulary = learn((source.text() for _ in range(VOCABULARY_EXAMPLES)), network.Shape().vocabulary)
            shape = network.Shape(vocabulary=len(vocabulary.pieces))
            tensors = network.fresh(shape, SEED)
        else:
            vocabulary, tensors, shape = gguf_file.read(options.file)
        log(f"lesson {number}")
        train(vocabulary, tensors, shape, lesson, log)
        size = gguf_file.write(options.file, vocabulary, tensors, shape)
        digest = hashlib.sha256(options.file.read_bytes()).hexdigest()
        log(f"{options.file}: {size / 1e6:.2f} MB, sha256 {digest}")
    vocabulary, tensors, shape = gguf_file.read(options.file)
    held_out = Material(SEED + 2, talk.SECOND)
    with torch.no_grad():
        drawn = [loss_of(tensors, shape, batch(held_out.rows(vocabulary, LENGTH))).item() for _ in range(8)]
    perplexity = math.exp(sum(drawn) / len(drawn))
    log(f"perplexity on unseen conversations (answers count fully, questions a little): {perplexity:.3f}")
    for line in examine.report(tensors, shape, vocabulary, held_out):
        log(line)


if __name__ == "__main__":
    main()
