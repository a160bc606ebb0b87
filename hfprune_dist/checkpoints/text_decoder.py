"""The text decoder inside a model of images and text: what config.json says of it, and which tensors are its own.

It alone is pruned; everything else of such a checkpoint is copied. Sizes are in config.json's ``text_config``, or, in
older files, beside ``vision_config``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Those of which it is tested, by their model_type, that images do to a pruned decoder what they do to a masked one.
KNOWN = ("gemma3", "idefics3", "llava", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "smolvlm")
# What the modules of a text decoder are called.
BODIES = ("model.language_model.", "model.text_model.")
HEAD = "lm_head."
# Keys of a config.json that are of the whole model, wherever its text decoder's are.
_OF_THE_WHOLE = ("architectures", "auto_map", "tie_word_embeddings")
# Where encoders of images put something between the first layers: the key of ``vision_config`` that lists from where.
DEEPSTACK = "deepstack_visual_indexes"
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
# model_type -> what its configuration class takes for keys that ``text_config`` lacks.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8},
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
}


def has_vision(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a model of images and text."""
    return isinstance(config.get("vision_config"), Mapping)


def decoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What it says of the text decoder, as the ``config.json`` of a decoder alone would say it."""
    text = config.get("text_config")
    vision = config["vision_config"]
    deepstack = {DEEPSTACK: vision[DEEPSTACK]} if vision.get(DEEPSTACK) else {}
    if not isinstance(text, Mapping):
        return {**config, **deepstack}
    model_type = str(text.get("model_type", f"{config.get('model_type')}_text"))
    whole = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}
    return {**DEFAULTS.get(model_type, {}), **text, "model_type": model_type, **whole, **deepstack}


def with_decoder(config: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """The whole ``config.json`` once ``decoder`` holds of its text decoder; what doesn't change stays as it is.

    Args:
        decoder: of the form that ``decoder_config`` gives.
    """
    before = decoder_config(config)
    changed = {key: value for key, value in decoder.items() if before.get(key) != value or key not in before}
    of_whole = {key: changed.pop(key) for key in _OF_THE_WHOLE if key in changed and _is_news(config, key, changed)}
    changed = {key: value for key, value in changed.items() if key not in _OF_THE_WHOLE}
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return {**config, **changed, **of_whole}
    return {**config, "text_config": {**text, **changed}, **of_whole}


def _is_news(config: Mapping[str, Any], key: str, changed: Mapping[str, Any]) -> bool:
    """Whether it must be said of the whole model: not of a head that is tied, or has a weight, as it was before."""
    return key != "tie_word_embeddings" or (bool(config.get(key)) and not changed[key])


def is_of_decoder(name: str) -> bool:
    """Whether a tensor is the text decoder's, or the head's."""
    return name.startswith((*BODIES, HEAD))


def beside_decoder(names: Iterable[str]) -> frozenset[str]:
    """The tensors that are copied."""
    return frozenset(name for name in names if not is_of_decoder(name))
