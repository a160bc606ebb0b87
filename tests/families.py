"""Tiny random models of many architectures, each made from its own configuration class, and their outputs."""

from __future__ import annotations

from copy import deepcopy as own  # configuration classes change lists that they are given
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from written_once import write_once

from hfprune_dist.structures.experts import EXPERT_COUNT_KEYS

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
_SCALED = {"residual_multiplier": 0.3, "logits_scaling": 4.0}
_GRANITE = {"num_local_experts": 4, "shared_intermediate_size": 16, **_SCALED}
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
# model_type -> settings that turn on every feature of the architecture.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "ministral3": {"sliding_window": 4},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, **_SCALED},
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
    "granite_swa": {"embedding_multiplier": 3.0, "layer_rope_theta": [10000.0, 0.0, 50.0], **_SCALED},
    "hyperclovax": {"embedding_multiplier": 3.0, **_SCALED},
    "internlm3": {},
    "iquestcoder": {},
    "ministral": SLIDING,
    "vaultgemma": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, **SLIDING},
    "youtu": {
        **LATENT,
        "pad_token_id": None,  # transformers zeroes the row of a padding token when it loads
    },
    "qwen3_5_text": _DELTA,
    "arcee": {"mlp_bias": True},
    "nemotron": {"mlp_bias": True},
    "apertus": {},
    "starcoder2": {"use_bias": True, "residual_dropout": 0.0, "embedding_dropout": 0.1, "attention_dropout": 0.0},
    "jais2": {},
    "phi": {"embd_pdrop": 0.1},
    "gpt_neox": {"hidden_dropout": 0.1},
    "opt": {"ffn_dim": 24, "dropout": 0.0},
    "bamba": {**MAMBA, "attn_layer_indices": [1], "attn_rotary_emb": 8},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 24,
        **_SCALED,
    },
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0},
    "olmo": {},
    "helium": {},
    "stablelm": {},
    "nanochat": {"final_logit_softcapping": 5.0},
    "persimmon": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"], "sliding_window": 4},
    "apertus1p5_text": {},
    "exaone": {},
    "doge": {"num_experts": 4},
}
# Likewise for mixtures of experts.
MIXTURES: dict[str, dict[str, object]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1], "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "decoder_sparse_step": 2,
    },
    "glm4_moe": _ROUTED | {"use_qk_norm": True},
    "deepseek_v3": _ROUTED | _GROUPS | LATENT,
    "granitemoe": {"num_local_experts": 4, **_SCALED},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 4},
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
    "exaone_moe": _TYPES | SLIDING | {"num_experts": 4, "moe_intermediate_size": 24, "num_shared_experts": 2},
    "solar_open": {"n_routed_experts": 4, "moe_intermediate_size": 24, "n_shared_experts": 1},
    "afmoe": SLIDING
    | {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "num_shared_experts": 2,
        "num_dense_layers": 1,
        "mup_enabled": True,
    },
    "mimo_v2_flash": _TYPES | SLIDING | {"n_routed_experts": 4, "moe_intermediate_size": 24},
    "cohere2_moe": SLIDING
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
    "kolibri1": {"num_local_experts": 4} | _SHARED | SLIDING,
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


# The token that stands for a part of an image, and how many of them stand for one image.
IMAGE_TOKEN, IMAGE_TOKENS = 2, 4
ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_QWEN_ENCODER = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
_QWEN = {"image_token_id": IMAGE_TOKEN, "video_token_id": 1, "vision_start_token_id": 1}
_IDEFICS = {
    "text_config": {"model_type": "llama"},
    "vision_config": ENCODER,
    "image_token_id": IMAGE_TOKEN,
    "scale_factor": 1,
}
# Likewise for models of images and text; the sizes of their text decoders are ``SHAPE``.
SEEING: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"query_pre_attn_scalar": 8, **SLIDING},
        "vision_config": ENCODER,
        "mm_tokens_per_image": IMAGE_TOKENS,
        "image_token_index": IMAGE_TOKEN,
    },
    "qwen2_5_vl": {
        "text_config": _AXES,
        "vision_config": _QWEN_ENCODER | {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN,
    },
    "qwen3_vl": {
        "text_config": _AXES,
        "vision_config": _QWEN_ENCODER
        | {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN,
    },
    "qwen3_5": {
        "text_config": FAMILIES["qwen3_5_text"] | _AXES,
        "vision_config": _QWEN_ENCODER | {"patch_size": 4, "num_position_embeddings": 16},
        **_QWEN,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": ENCODER | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": IMAGE_TOKEN,
        "spatial_merge_size": 1,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": ENCODER | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE_TOKEN,
    },
    "smolvlm": _IDEFICS,
    "idefics3": _IDEFICS,
}


# Likewise for mixtures of experts among these.
SEEING_EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "text_config": {**_DELTA, **_AXES, **_SHARED, "num_experts_per_tok": 2},
        "vision_config": _QWEN_ENCODER | {"patch_size": 4, "num_position_embeddings": 16},
        **_QWEN,
    },
}
ALL_SEEING = SEEING | SEEING_EXPERTS
EVERY = FAMILIES | ALL_SEEING | MIXTURES


def with_experts(model_type: str, count: int) -> dict[str, int]:
    """Return the setting that gives a model of such an architecture this many experts in a layer."""
    return {next(key for key in EXPERT_COUNT_KEYS if key in MIXTURES[model_type]): count}


def make_model(model_type: str, **changes: object) -> torch.nn.Module:
    """Return a random float32 model whose outputs are far from uniform."""
    torch.manual_seed(0)
    if model_type in ALL_SEEING:
        settings = own(ALL_SEEING[model_type])
        config = CONFIG_MAPPING[model_type](**settings | {"text_config": SHAPE | settings["text_config"] | changes})
        model = AutoModelForImageTextToText.from_config(config).eval()
    else:
        of_family = FAMILIES.get(model_type)
        settings = own({"num_experts_per_tok": 2, **MIXTURES[model_type]} if of_family is None else of_family)
        config = CONFIG_MAPPING[model_type](**SHAPE | settings | own(changes))
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            else:  # around 0 or 1, as the architecture initializes them
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def save_model(folder: Path, model_type: str, **changes: object) -> Path:
    """Write a checkpoint folder as a user has it."""

    def make(empty: Path) -> None:
        make_model(model_type, **changes).save_pretrained(empty)
        tiny_tokenizer().save_pretrained(empty)

    settings = [of_some.get(model_type) for of_some in (ALL_SEEING, FAMILIES, MIXTURES)]
    return write_once(folder, f"{model_type} {settings} {sorted(changes.items())}", make)
