"""Tiny random models of many architectures, each from its own configuration class, and what they compute."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# model_type -> settings that make the architecture do all that it can do.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "ministral3": {"sliding_window": 4},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.2,
    },
    "cohere2": {"logit_scale": 0.25, **SLIDING},
    "seed_oss": {},
    "ernie4_5": {"use_bias": True},
    "hunyuan_v1_dense": {},
    "gemma": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "exaone4": SLIDING,
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 8.0, "query_pre_attn_scalar": 8, **SLIDING},
    "gemma3_text": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, **SLIDING},
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
        "final_logit_softcapping": 5.0,
        **SLIDING,
    },
    "phi3": {"sliding_window": 4},
    "glm": {"attention_bias": True},
    "glm4": {},
    "cohere": {},
    "cwm": SLIDING,
    "gemma4_unified_text": {"global_head_dim": 16, "final_logit_softcapping": 5.0, **SLIDING},
    "granite_swa": {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "hyperclovax": {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "internlm3": {},
    "iquestcoder": {},
    "ministral": SLIDING,
    "vaultgemma": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, **SLIDING},
    "youtu": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "pad_token_id": None,  # whose row transformers empties as it loads
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
}
# The same of mixtures of experts.
EXPERTS: dict[str, dict[str, object]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1], "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "decoder_sparse_step": 2,
    },
    "glm4_moe": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "granitemoe": {"num_local_experts": 4, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 4},
}


def make_model(model_type: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random float32 model whose outputs are far from uniform."""
    settings = FAMILIES[model_type] if model_type in FAMILIES else {"num_experts_per_tok": 2, **EXPERTS[model_type]}
    config = CONFIG_MAPPING[model_type](**{**SHAPE, **settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            else:  # around 0 or 1, as the architecture begins them
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def save_model(folder: Path, model_type: str, **changes: object) -> Path:
    """A checkpoint folder as a user has it."""
    make_model(model_type, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
