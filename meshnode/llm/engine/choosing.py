"""Which token follows: llama.cpp's sampler chain and grammar, driven by logits of one row.

The grammar is asked about the chosen token first and about all tokens only if it objects, as llama.cpp's own tools do:
asking about all is slow. Each draw has a seed of its own (protocol/sharding/sampling.py says why).
"""

import ctypes
import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from meshnode.llm.engine.library import llama_cpp
from meshnode.llm.engine.vocabulary import Vocabulary
from protocol.sharding.frames import Alternative
from protocol.sharding.sampling import Grammar, GrammarKind, Sampling, seed_of

_CANDIDATE: Final = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
SCHEMA_DEPTH_MAX: Final = 64


class GrammarRefused(Exception):  # noqa: N818 -- named after what happened
    """The grammar cannot be compiled, or what was said before does not follow it."""


def to_gbnf(grammar: Grammar) -> str:
    """The grammar as GBNF. A JSON schema goes through llama.cpp's converter. Raises GrammarRefused."""
    if grammar.kind is GrammarKind.GBNF:
        return grammar.text
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        _check_depth(json.loads(grammar.text))
        return str(json_schema_to_gbnf(grammar.text))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError, RecursionError) as error:
        raise GrammarRefused(f"This JSON schema cannot be turned into a grammar: {error!r}"[:500]) from error


def _check_depth(schema: Any, depth: int = 0) -> None:
    if depth > SCHEMA_DEPTH_MAX:
        raise GrammarRefused(f"This JSON schema is nested deeper than {SCHEMA_DEPTH_MAX} levels.")
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for value in inner:
        _check_depth(value, depth + 1)


def compile_grammar(vocabulary: Vocabulary, gbnf: str) -> Any:
    """A grammar sampler; the caller frees it. Raises GrammarRefused."""
    sampler = llama_cpp.llama_sampler_init_grammar(vocabulary.pointer, gbnf.encode(), b"root") if gbnf else None
    if not sampler:
        raise GrammarRefused(
            "llama.cpp cannot compile this grammar: it needs a rule named root, and no left recursion."
        )
    return sampler


class Chooser:
    """The sampler of one session. `close` frees what llama.cpp holds for it; nothing may be asked afterwards."""

    def __init__(self, vocabulary: Vocabulary, sampling: Sampling, recent: Sequence[int]) -> None:
        self._vocabulary, self._sampling = vocabulary, sampling
        self._grammar: Any = None
        self._chain: Any = None
        bias = dict(sampling.logit_bias)
        if sampling.ignore_eos:
            bias |= dict.fromkeys(vocabulary.eog_tokens(), float("-inf"))
        if any(token >= vocabulary.size for token in bias):
            raise GrammarRefused(f"A logit bias is for a token outside the vocabulary of {vocabulary.size}.")
        if sampling.grammar is not None:
            self._grammar = compile_grammar(vocabulary, to_gbnf(sampling.grammar))
        self._biased: npt.NDArray[np.int64] | None = None
        if sampling.is_greedy and not sampling.has_penalties and self._grammar is None:
            # The largest logit: building the sampler for it would delay the first token.
            if bias:
                self._biased = np.fromiter(bias, np.int64, len(bias))
                self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        else:
            self._build_chain(bias)
            self._ids = np.arange(vocabulary.size, dtype=np.int32)
            self._candidates = np.zeros(vocabulary.size, _CANDIDATE)
            for token in recent:
                if token < vocabulary.size:
                    llama_cpp.llama_sampler_accept(self._chain, token)
        self._has_draw = False

    def _build_chain(self, bias: dict[int, float]) -> None:
        sampling, size = self._sampling, self._vocabulary.size
        params = llama_cpp.llama_sampler_chain_default_params()
        self._chain = llama_cpp.llama_sampler_chain_init(params)
        links = []
        if bias:
            array = (llama_cpp.llama_logit_bias * len(bias))()
            for place, (token, value) in enumerate(bias.items()):
                array[place].token, array[place].bias = token, value
            links.append(llama_cpp.llama_sampler_init_logit_bias(size, len(bias), array))
        if sampling.has_penalties:
            links.append(
                llama_cpp.llama_sampler_init_penalties(
                    size,
                    sampling.penalty_window,
                    sampling.repeat_penalty,
                    sampling.frequency_penalty,
                    sampling.presence_penalty,
                )
            )
        if sampling.is_greedy:
            links.append(llama_cpp.llama_sampler_init_greedy())
        else:
            if sampling.top_k:
                links.append(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
            if sampling.typical_p < 1.0:
                links.append(llama_cpp.llama_sampler_init_typical(sampling.typical_p, 1))
            if sampling.top_p < 1.0:
                links.append(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
            if sampling.min_p > 0.0:
                links.append(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
            links.append(llama_cpp.llama_sampler_init_temp(sampling.temperature))
        for link in links:
            llama_cpp.llama_sampler_chain_add(self._chain, link)

    def close(self) -> None:
        """Free the chain and the grammar."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                llama_cpp.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def choose(self, logits: npt.NDArray[np.float32], index: int) -> int:
        """The token number `index` of the answer, from the logits of the one before. It is not yet accepted.

        Raises GrammarRefused when no token is possible.
        """
        if self._chain is None:
            if self._biased is not None:
                logits = logits.copy()
                logits[self._biased] += self._bias
            return int(logits.argmax())
        if not self._sampling.is_greedy:
            self._draw_with(seed_of(self._sampling.seed, index))
        token = self._apply(logits, None)
        if self._grammar is None or self._allows(token):
            return token
        return self._apply(logits, self._grammar)

    def _draw_with(self, seed: int) -> None:
        if self._has_draw:
            last = llama_cpp.llama_sampler_chain_n(self._chain) - 1
            llama_cpp.llama_sampler_free(llama_cpp.llama_sampler_chain_remove(self._chain, last))
        llama_cpp.llama_sampler_chain_add(self._chain, llama_cpp.llama_sampler_init_dist(seed))
        self._has_draw = True

    def _apply(self, logits: npt.NDArray[np.float32], grammar: Any) -> int:
        candidates = self._candidates
        candidates["id"] = self._ids
        candidates["logit"] = logits
        array = _as_array(candidates)
        if grammar is not None:
            llama_cpp.llama_sampler_apply(grammar, ctypes.byref(array))
            # The sampler only marks; were all marked, the chain would pick one of them all the same.
            if not np.isfinite(candidates["logit"]).any():
                raise GrammarRefused("No token of this model can go on with the grammar.")
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise GrammarRefused("The sampler chose no token.")
        return int(array.data[array.selected].id)

    def _allows(self, token: int) -> bool:
        one = np.zeros(1, _CANDIDATE)
        one["id"] = token
        llama_cpp.llama_sampler_apply(self._grammar, ctypes.byref(_as_array(one)))
        return bool(np.isfinite(one["logit"][0]))

    def accept(self, token: int, *, check: bool = False) -> None:
        """A token was said. With `check` it comes from elsewhere: the grammar would abort the process over a wrong one.

        Raises GrammarRefused.
        """
        if self._grammar is not None:
            if check and not self._allows(token):
                raise GrammarRefused("What was said before does not follow the grammar.")
            llama_cpp.llama_sampler_accept(self._grammar, token)
        if self._chain is not None:
            llama_cpp.llama_sampler_accept(self._chain, token)


def _as_array(candidates: npt.NDArray[Any]) -> Any:
    array = llama_cpp.llama_token_data_array()
    array.data = ctypes.cast(candidates.ctypes.data, llama_cpp.llama_token_data_p)
    array.size, array.selected, array.sorted = len(candidates), -1, False
    return array


def alternatives(
    vocabulary: Vocabulary, logits: npt.NDArray[np.float32], token: int, count: int
) -> tuple[Alternative, ...]:
    """The chosen token and the `count` likeliest, with log-probabilities of the model's own distribution."""
    wide = logits.astype(np.float64)
    top = wide.max()
    logprobs = wide - (top + np.log(np.exp(wide - top).sum()))
    best: list[int] = []
    if count:
        some = np.argpartition(logprobs, -count)[-count:]
        best = [int(one) for one in some[np.argsort(-logprobs[some], kind="stable")]]
    return tuple(Alternative(one, float(logprobs[one]), vocabulary.piece(one, special=True)) for one in (token, *best))
