"""Further mixtures of experts that share the form of one in ``families.EXPERTS``, so that fewer tests cover them."""

from __future__ import annotations

_ROUTED = {"n_routed_experts": 4, "moe_intermediate_size": 24, "n_shared_experts": 2, "first_k_dense_replace": 1}
_GROUPS = {"n_group": 2, "topk_group": 1}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 1,
    "mamba_chunk_size": 4,
}
_INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}
_TYPES = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GRANITE = {"num_local_experts": 4, "shared_intermediate_size": 16, "residual_multiplier": 0.3, "logits_scaling": 4.0}
_KIMI = {
    "num_local_experts": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    **LATENT,
    **_TYPES,
}
MORE_EXPERTS: dict[str, dict[str, object]] = {
    "qwen3_next": _SHARED | _DELTA,
    "qwen3_5_moe_text": _SHARED | _DELTA,
    "deepseek_v2": _ROUTED | LATENT,
    "dots1": _ROUTED | _GROUPS,
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "phimoe": {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    "minimax_m2": {"num_local_experts": 4},
    "glm4_moe_lite": _ROUTED | LATENT | _GROUPS | _TYPES | {"num_attention_heads": 5, "num_key_value_heads": 5},
    "glm_moe_dsa": _ROUTED | LATENT | _GROUPS | _TYPES | _INDEX,
    "deepseek_v32": _ROUTED | LATENT | _GROUPS | _INDEX,
    "flex_olmo": {"num_experts": 4},
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE
    | {
        "num_experts_per_tok": 2,
        "layer_types": ["mamba", "attention", "mamba"],
        **MAMBA,
    },
    "lfm2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "jamba": {
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": _KIMI,
    "exaone_moe": _TYPES | _SLIDING | {"num_experts": 4, "moe_intermediate_size": 24, "num_shared_experts": 2},
    "solar_open": {"n_routed_experts": 4, "moe_intermediate_size": 24, "n_shared_experts": 1},
    "afmoe": _SLIDING
    | {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "num_shared_experts": 2,
        "num_dense_layers": 1,
        "mup_enabled": True,
    },
    "mimo_v2_flash": _TYPES | _SLIDING | {"n_routed_experts": 4, "moe_intermediate_size": 24},
    "cohere2_moe": _SLIDING
    | {"num_experts": 4, "num_shared_experts": 2, "logit_scale": 0.25, "prefix_dense_intermediate_size": 16, **_TYPES},
    "granitemoe_swa": _GRANITE | {"layer_rope_theta": [10000.0, 0.0, 50.0]},
    "mellum": {"num_local_experts": 4, "moe_intermediate_size": 24},
    "minimax": {
        "num_local_experts": 4,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "block_size": 8,
    },
    "axk1": _ROUTED | LATENT | _GROUPS | _TYPES,
    "flint": _SHARED | {"mlp_only_layers": [0]},
    "sarvam_mla": _ROUTED | LATENT,
    "kolibri1": {"num_local_experts": 4} | _SHARED | _SLIDING,
    "minimax_m3_vl_text": {
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
        "dense_intermediate_size": 40,
        **_TYPES,
    },
    "bailing_hybrid": _KIMI | _GROUPS,
    "hy_v3": _TYPES | {"num_experts": 4, "moe_intermediate_size": 24, "num_shared_experts": 2},
    "laguna": _SHARED | _TYPES | {"num_attention_heads_per_layer": [4, 2, 4]},
}
