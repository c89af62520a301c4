"""Architectures in which every token goes through the same weights."""

from meshnode.llm.gguf.tiny.maker import F32, VOCABULARY, Maker


def llama(m: Maker) -> None:
    m.sizes()
    m.rms()
    m.vocabulary()
    m.ends()
    # As Llama 3 has it: one tensor that every layer uses.
    m.plain("rope_freqs", m.head // 2, 1.0)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "ffn_norm", m.d)
        m.gated(block)


def qwen2(m: Maker) -> None:
    m.sizes()
    m.rms()
    m.vocabulary()
    m.ends(output=False)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block, bias=True)
        m.norm(block + "ffn_norm", m.d)
        m.gated(block)


def qwen3(m: Maker) -> None:
    m.sizes(head=True)
    m.rms()
    m.vocabulary()
    m.ends(output=False)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "attn_q_norm", m.head)
        m.norm(block + "attn_k_norm", m.head)
        m.norm(block + "ffn_norm", m.d)
        m.gated(block)


def gemma3(m: Maker) -> None:
    m.sizes(head=True, rope=1e6)
    m.rms()
    m.put("attention.sliding_window", "u32", 16)
    m.put("rope.freq_base_swa", "f32", 10000.0)
    m.vocabulary()
    m.ends(output=False)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "attn_q_norm", m.head)
        m.norm(block + "attn_k_norm", m.head)
        m.norm(block + "post_attention_norm", m.d)
        m.norm(block + "ffn_norm", m.d)
        m.gated(block)
        m.norm(block + "post_ffw_norm", m.d)


def phi3(m: Maker) -> None:
    m.sizes()
    m.rms()
    m.put("rope.scaling.original_context_length", "u32", 1024)
    m.vocabulary()
    m.ends()
    m.plain("rope_factors_long", m.head // 2, 1.5)
    m.plain("rope_factors_short", m.head // 2, 1.0)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block, fused=True)
        m.norm(block + "ffn_norm", m.d)
        m.weight(block + "ffn_up", m.d, 2 * m.ff)
        m.weight(block + "ffn_down", m.ff, m.d)


def olmo2(m: Maker) -> None:
    m.sizes()
    m.rms()
    m.put("attention.sliding_window", "u32", 16)
    m.vocabulary()
    m.ends()
    for block in m.blocks():
        m.qkv(block)
        m.norm(block + "attn_q_norm", m.heads * m.head)
        m.norm(block + "attn_k_norm", m.kv_heads * m.head)
        m.norm(block + "post_attention_norm", m.d)
        m.gated(block)
        m.norm(block + "post_ffw_norm", m.d)


def granite(m: Maker) -> None:
    m.put("attention.scale", "f32", 0.1)
    m.put("embedding_scale", "f32", 12.0)
    m.put("residual_scale", "f32", 0.22)
    m.put("logit_scale", "f32", 8.0)
    llama(m)


def starcoder2(m: Maker) -> None:
    m.sizes()
    m.put("attention.layer_norm_epsilon", "f32", 1e-5)
    m.vocabulary()
    m.ends(output=False, bias=True)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d, bias=True)
        m.qkv(block, bias=True)
        m.bias(block + "attn_output", m.d)
        m.norm(block + "ffn_norm", m.d, bias=True)
        m.weight(block + "ffn_up", m.d, m.ff)
        m.bias(block + "ffn_up", m.ff)
        m.weight(block + "ffn_down", m.ff, m.d)
        m.bias(block + "ffn_down", m.d)


def stablelm(m: Maker) -> None:
    m.sizes()
    m.put("attention.layer_norm_epsilon", "f32", 1e-5)
    m.put("use_parallel_residual", "bool", False)
    m.vocabulary()
    m.ends(bias=True)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d, bias=True)
        m.qkv(block)
        m.norm(block + "ffn_norm", m.d, bias=True)
        m.gated(block)


def smollm3(m: Maker) -> None:
    m.sizes()
    m.rms()
    m.vocabulary()
    m.ends(output=False)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "ffn_norm", m.d)
        m.gated(block)


def plain(m: Maker) -> None:
    """What mistral3, ernie4_5 and others have in common."""
    m.sizes(head=True)
    m.rms()
    m.vocabulary()
    m.ends()
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "ffn_norm", m.d)
        m.gated(block)


def arcee(m: Maker) -> None:
    m.sizes(head=True)
    m.rms()
    m.vocabulary()
    m.ends()
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "ffn_norm", m.d)
        m.weight(block + "ffn_up", m.d, m.ff)
        m.weight(block + "ffn_down", m.ff, m.d)


def cohere2(m: Maker) -> None:
    m.put("attention.sliding_window", "u32", 16)
    command_r(m)


def command_r(m: Maker) -> None:
    m.sizes(head=True)
    m.put("attention.layer_norm_epsilon", "f32", 1e-5)
    m.put("logit_scale", "f32", 0.25)
    m.vocabulary()
    m.ends(output=False)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.gated(block)


def exaone4(m: Maker) -> None:
    m.sizes(head=True)
    m.rms()
    m.vocabulary()
    m.ends()
    for block in m.blocks():
        m.qkv(block)
        m.norm(block + "attn_q_norm", m.head)
        m.norm(block + "attn_k_norm", m.head)
        m.norm(block + "post_attention_norm", m.d)
        m.gated(block)
        m.norm(block + "post_ffw_norm", m.d)


def gpt2(m: Maker) -> None:
    """Positions are looked up and added to the input; the head is the embedding."""
    m.kv_heads = m.heads
    m.sizes(context=512)
    m.put("attention.layer_norm_epsilon", "f32", 1e-5)
    m.vocabulary()
    m.ends(output=False, bias=True)
    m.weight("position_embd", m.d, 512, kind=F32)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d, bias=True)
        m.qkv(block, fused=True)
        m.bias(block + "attn_qkv", 3 * m.d)
        m.bias(block + "attn_output", m.d)
        m.norm(block + "ffn_norm", m.d, bias=True)
        m.weight(block + "ffn_up", m.d, m.ff)
        m.bias(block + "ffn_up", m.ff)
        m.weight(block + "ffn_down", m.ff, m.d)
        m.bias(block + "ffn_down", m.d)


def hunyuan(m: Maker) -> None:
    m.sizes(head=True)
    m.rms()
    m.vocabulary()
    m.ends(output=False)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "attn_q_norm", m.head)
        m.norm(block + "attn_k_norm", m.head)
        m.norm(block + "ffn_norm", m.d)
        m.gated(block)


def minicpm(m: Maker) -> None:
    m.put("embedding_scale", "f32", 12.0)
    m.put("residual_scale", "f32", 0.495)
    m.put("logit_scale", "f32", 1.0)
    plain(m)


def phi2(m: Maker) -> None:
    m.kv_heads = m.heads
    m.sizes()
    m.put("attention.layer_norm_epsilon", "f32", 1e-5)
    m.vocabulary()
    m.ends(bias=True)
    m.bias("output", VOCABULARY)
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d, bias=True)
        m.qkv(block, bias=True)
        m.bias(block + "attn_output", m.d)
        m.weight(block + "ffn_up", m.d, m.ff)
        m.bias(block + "ffn_up", m.ff)
        m.weight(block + "ffn_down", m.ff, m.d)
        m.bias(block + "ffn_down", m.d)


def seed_oss(m: Maker) -> None:
    m.sizes(head=True)
    m.rms()
    m.vocabulary()
    m.ends()
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block, bias=True)
        m.norm(block + "post_attention_norm", m.d)
        m.gated(block)
