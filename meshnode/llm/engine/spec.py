"""What an agent and its engine process say to each other besides the frames that travel between nodes.

Both sides import this; it imports neither llama.cpp nor trio.
"""

from typing import Final, Literal

import msgspec

from protocol.ids import NODE_ID_BYTES
from protocol.sharding import frames
from protocol.sharding import slots as batching
from protocol.sharding.frames import Kind
from protocol.sharding.steps import step_bytes_max

LOAD: Final = 45
"""The kind of the one frame that an engine reads before anything else: its StageSpec."""

ENTRY_LOST: Final = 46
"""The kind of a frame whose body is a node's 20 bytes: end all its sessions."""

REQUEST_BYTES_MAX: Final = frames.MESSAGE_BYTES_MAX
BEAT_INTERVAL_S: Final = 0.5
MEMORY_EXIT_CODE: Final = 77
"""The exit status of an engine whose allocations failed; any other end by itself is a crash."""

ORPHAN_EXIT_CODE: Final = 78


class StageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One stage to load. `layers` are those that it computes; a file with one more has a tail for the layer_inp hook.

    `threads` is exactly what the node lends. `gpu_layers` -1: as many as fit. `context` is the longest session and
    `cells` what all slots may hold together, in tokens, the same on all stages of a pipeline.
    """

    path: str
    layers: int
    stage: int = 0
    stages: int = 1
    slots: int = 4
    context: int = 4096
    cells: int = 4096
    rows_max: int = 512
    prefill_rows: int = batching.PREFILL_ROWS_MAX
    prefill_rows_beside_streams: int = batching.PREFILL_ROWS_BESIDE_STREAMS
    draft_tokens_max: int = batching.DRAFT_TOKENS_MAX
    queue_max: int = batching.QUEUE_MAX
    threads: int = 1
    gpu_layers: int = 0
    flash_attention: bool | None = None
    nice: int = 0
    memory_bytes_max: int | None = None
    drafting: Literal["auto", "always", "never"] = "auto"
    exact_drafts: bool = True
    """Guesses are computed row by row, so that the answer is the same to the byte as without them. False: in one batch,
    which is faster to compute and may differ where two tokens are all but equally likely."""

    hook: str = ""
    """`layer_inp` or `cb_eval` to insist on one; empty: the best that the file allows."""

    node: bytes = bytes(NODE_ID_BYTES)

    lends: bool = False
    """Hold nothing and run llama.cpp's RPC server, for the one tunnel that the process was started with."""

    lent_bytes: int = 0
    """What the client of a lending process may fill at most."""

    remote_layers: tuple[int, ...] = ()
    """How many of the last layers each tunnel's RPC server takes, in the order of the tunnels; the rest stays here."""

    @property
    def is_first(self) -> bool:
        """Whether this stage sequences."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage samples."""
        return self.stage == self.stages - 1

    def limits(self, *, can_rewind: bool) -> batching.Limits:
        """What the batcher may plan with."""
        return batching.Limits(
            slots=self.slots,
            context=self.context,
            cells=self.cells,
            stages=self.stages,
            rows_max=self.rows_max,
            prefill_rows=min(self.prefill_rows, self.rows_max),
            prefill_rows_beside_streams=min(self.prefill_rows_beside_streams, self.rows_max),
            draft_tokens_max=self.draft_tokens_max,
            queue_max=self.queue_max,
            can_rewind=can_rewind,
        )


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded stage is. Memory in bytes, of what this process allocated besides the mapped file."""

    architecture: str
    embedding_width: int
    vocabulary: int
    layers: int
    hook: str
    context_trained: int
    can_rewind: bool
    openmp: bool
    kept_threads: bool
    gpu_backend: bool
    gpu_layers: int
    isolated: bool
    model_bytes: int
    kv_bytes: int
    compute_bytes: int
    output_bytes: int
    rss_bytes: int
    load_s: float
    chat_template: str | None
    bos: int | None
    eos: int | None
    adds_bos: bool
    llama_cpp: str
    system: str


class Loading(msgspec.Struct, frozen=True, array_like=True):
    """How far loading is, 0 to 1."""

    share: float


class Tokenise(msgspec.Struct, frozen=True, array_like=True):
    """Text to tokens. `parse_special`: names of control tokens mean those tokens, but for those in `quoted` spans."""

    request: int
    text: str
    add_special: bool = True
    parse_special: bool = True
    quoted: tuple[tuple[int, int], ...] = ()


class Detokenise(msgspec.Struct, frozen=True, array_like=True):
    """Tokens to the bytes they stand for."""

    request: int
    tokens: frames.Tokens
    special: bool = False


class TakeSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """A slot's KV, out of this process."""

    request: int
    slot: int


class Restore(msgspec.Struct, frozen=True, array_like=True):
    """A slot's KV, as another process gave it, for an idle slot. `tokens` is what it holds."""

    request: int
    slot: int
    tokens: frames.Tokens
    data: bytes


class Calibrate(msgspec.Struct, frozen=True, array_like=True):
    """Measure, on an idle engine."""

    request: int
    prefill_rows: int = 64
    rounds: int = 4


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """The answer to any of the requests; `failed` says in words why there is none."""

    request: int
    failed: str = ""
    tokens: tuple[int, ...] = ()
    data: bytes = b""
    seconds_per_token: float = 0.0
    seconds_per_prefill_row: float = 0.0
    bytes_per_s: float = 0.0


Request = Tokenise | Detokenise | TakeSnapshot | Restore | Calibrate

REQUEST_KINDS: Final[dict[type, Kind]] = {
    Tokenise: Kind.TOKENISE,
    Detokenise: Kind.DETOKENISE,
    TakeSnapshot: Kind.SNAPSHOT,
    Restore: Kind.RESTORE,
    Calibrate: Kind.CALIBRATE,
}
ANSWER_KINDS: Final = frozenset({Kind.TOKENISED, Kind.DETOKENISED, Kind.SNAPSHOT_TAKEN, Kind.RESTORED, Kind.CALIBRATED})


def frame_bytes_max(spec: StageSpec, embedding_width: int) -> int:
    """The longest frame between an engine and its agent; snapshots apart, which go by their own limit."""
    return max(REQUEST_BYTES_MAX, step_bytes_max(embedding_width, spec.rows_max)) + 1024
