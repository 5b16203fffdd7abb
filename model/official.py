"""The 671B model's config, for planning without its files (spec section 1.1)."""

from __future__ import annotations

from rayseek.model.config import ModelConfig, Yarn

DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    first_k_dense_replace=3,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=163840,
    num_nextn_predict_layers=1,
    yarn=Yarn(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0),
    fp8_blocks=True,
)
"""V3, V3-Base and V3-0324 alike."""
