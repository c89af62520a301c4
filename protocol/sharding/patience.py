"""How long a generation session waits for what, and how often it tries. What it then does is `session`'s."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionParameters:
    """Times in seconds."""

    silent_s: float = 4.5  # nothing at all from a pipeline's last stage or its agent: it hangs
    prefill_s: float = 900.0  # signs of life, but no first token
    tokenless_s: float = 60.0  # signs of life, but no next token
    answer_s: float = 12.0  # an Ensure stays without answer
    unanswered_s: float = 30.0  # no Ensure was answered at all
    load_s: float = 1800.0  # answers say only that it is being loaded
    busy_s: float = 60.0  # all slots and the queue before them are full
    ask_gap_s: float = 0.5  # between two answers that say Loading
    backoff_s: float = 0.1  # doubles
    backoff_max_s: float = 5.0
    tries_max: int = 6  # in a row without a single token
    attempts_max: int = 256
    strikes_max: int = 2  # from then on a node is avoided
