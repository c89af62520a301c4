"""Architectures with experts, of which each token uses some."""

from meshnode.llm.gguf.tiny.maker import Maker


def mixture(m: Maker, *, dense: int, shared: int = 0, every_head: bool = False, norms: bool = False) -> None:
    """A mixture of experts whose first `dense` layers are none."""
    if every_head:
        m.kv_heads = m.heads
    m.sizes(head=True)
    m.rms()
    m.put("expert_count", "u32", 4)
    m.put("expert_used_count", "u32", 2)
    m.put("expert_feed_forward_length", "u32", 256)
    m.put("expert_weights_scale", "f32", 1.5)
    m.put("leading_dense_block_count", "u32", dense)
    m.put("expert_gating_func", "u32", 1)
    if shared:
        m.put("expert_shared_count", "u32", shared)
    m.vocabulary()
    m.ends()
    for layer, block in enumerate(m.blocks()):
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        if norms:
            m.norm(block + "attn_q_norm", m.head)
            m.norm(block + "attn_k_norm", m.head)
        m.norm(block + "ffn_norm", m.d)
        if layer < dense:
            m.gated(block)
            continue
        m.experts(block, 4, 256)
        if shared:
            m.shared_expert(block, 256 * shared)


def bailingmoe(m: Maker) -> None:
    mixture(m, dense=0, shared=1)


def deepseek(m: Maker) -> None:
    mixture(m, dense=2, shared=1)


def dots1(m: Maker) -> None:
    mixture(m, dense=2, shared=1, every_head=True, norms=True)


def ernie_moe(m: Maker) -> None:
    m.put("interleave_moe_layer_step", "u32", 1)
    mixture(m, dense=3)


def granite_moe(m: Maker) -> None:
    m.put("attention.scale", "f32", 0.1)
    m.put("embedding_scale", "f32", 12.0)
    m.put("residual_scale", "f32", 0.22)
    m.put("logit_scale", "f32", 8.0)
    m.ff = 256
    mixture(m, dense=0)


def gpt_oss(m: Maker) -> None:
    m.sizes(head=True)
    m.rms()
    m.put("expert_count", "u32", 4)
    m.put("expert_used_count", "u32", 2)
    m.put("expert_feed_forward_length", "u32", 256)
    m.put("attention.sliding_window", "u32", 16)
    m.vocabulary()
    m.ends()
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block, bias=True)
        m.bias(block + "attn_output", m.d)
        m.plain(block + "attn_sinks", m.heads)
        m.norm(block + "post_attention_norm", m.d)
        m.experts(block, 4, 256, bias=True)


def llama4(m: Maker) -> None:
    m.sizes(head=True)
    m.rms()
    m.put("expert_count", "u32", 16)
    m.put("expert_used_count", "u32", 1)
    m.put("expert_feed_forward_length", "u32", 256)
    m.put("interleave_moe_layer_step", "u32", 2)
    m.vocabulary()
    m.ends()
    for layer, block in enumerate(m.blocks()):
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "ffn_norm", m.d)
        if (layer + 1) % 2 == 0:
            m.experts(block, 16, 256)
            m.shared_expert(block, 256)
        else:
            m.gated(block)


def olmoe(m: Maker) -> None:
    m.kv_heads, m.ff = m.heads, 256
    m.sizes()
    m.rms()
    m.put("expert_count", "u32", 4)
    m.put("expert_used_count", "u32", 2)
    m.vocabulary()
    m.ends()
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "attn_q_norm", m.d)
        m.norm(block + "attn_k_norm", m.d)
        m.norm(block + "ffn_norm", m.d)
        m.experts(block, 4, 256)


def qwen2moe(m: Maker) -> None:
    m.sizes()
    m.rms()
    m.put("expert_count", "u32", 4)
    m.put("expert_used_count", "u32", 2)
    m.put("expert_feed_forward_length", "u32", 256)
    m.put("expert_shared_feed_forward_length", "u32", 256)
    m.vocabulary()
    m.ends()
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block, bias=True)
        m.norm(block + "ffn_norm", m.d)
        m.experts(block, 4, 256)
        m.plain(block + "ffn_gate_inp_shexp", m.d)
        m.shared_expert(block, 256)


def qwen3moe(m: Maker) -> None:
    m.sizes(head=True)
    m.rms()
    m.put("expert_count", "u32", 4)
    m.put("expert_used_count", "u32", 2)
    m.put("expert_feed_forward_length", "u32", 256)
    m.vocabulary()
    m.ends()
    for block in m.blocks():
        m.norm(block + "attn_norm", m.d)
        m.qkv(block)
        m.norm(block + "attn_q_norm", m.head)
        m.norm(block + "attn_k_norm", m.head)
        m.norm(block + "ffn_norm", m.d)
        m.experts(block, 4, 256)
