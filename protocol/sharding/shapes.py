"""What planning needs to know of a model: sizes per layer, and where it may be cut. Reading a GGUF is not done here."""

import msgspec


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one model file as it lies on disk and in memory; bytes throughout.

    `layer_bytes`, `kv_bytes_per_token` and `window_tokens` have one entry a layer; a layer with a state of fixed size
    counts 0 bytes a token and its state in `state_bytes`. A cut c splits [0, c) from [c, layers); cuts rise,
    0 < c < layers. Without cuts the model runs whole or not at all, and `uncut_reason` says why.
    """

    digest: str  # SHA-256 of the file, hex
    name: str
    architecture: str
    quantisation: str
    n_embd: int
    n_vocab: int
    context_max: int  # tokens that the model was trained for
    layer_bytes: tuple[int, ...]
    kv_bytes_per_token: tuple[int, ...]  # keys and values as F16
    embed_bytes: int  # token embedding: on the first stage
    output_bytes: int  # output norm and head: on the last stage; a tied head counts here again
    cuts: tuple[int, ...] = ()
    uncut_reason: str = ""
    state_bytes: tuple[int, ...] = ()
    shared_bytes: int = 0  # on every stage
    tied_bytes: int = 0  # of `output_bytes`: the token embedding, which is the head too
    window_tokens: tuple[int, ...] = ()  # a layer keeps keys and values of so many tokens only; 0: of all
    layer_input: bool = False  # llama.cpp exports each layer's input: the cheaper hook, with a tail of zeros
    parameters: int = 0
    heads: int = 0
    heads_kv: int = 0
    experts: int = 0  # 0: a dense model
    experts_used: int = 0
    embeds: bool = False  # gives vectors, not text

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self.layer_bytes)

    @property
    def total_bytes(self) -> int:
        """All weights, a tied head once."""
        return sum(self.layer_bytes) + self.embed_bytes + self.output_bytes + self.shared_bytes - self.tied_bytes
