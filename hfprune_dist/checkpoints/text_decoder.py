"""The text decoder inside a model of images and text: its settings in config.json, and its tensors.

Only the decoder is pruned; everything else in such a checkpoint is copied. Its sizes are in config.json's
``text_config`` or, in older files, next to ``vision_config``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# The model_types for which tests show that a pruned decoder computes the same from images as a masked one.
KNOWN = ("gemma3", "idefics3", "llava", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "smolvlm")
# Beginnings of the names of a text decoder's modules, and of extra layers, which predict further tokens and aren't part
# of the model.
_OF_DECODER = ("model.language_model.", "model.text_model.", "lm_head.", "mtp.")
# Keys of a config.json that describe the whole model, wherever those of its text decoder are.
_OF_THE_WHOLE = ("architectures", "auto_map", "tie_word_embeddings")
# The key of ``vision_config`` that lists the encoder's layers whose outputs enter behind the decoder's first layers.
DEEPSTACK = "deepstack_visual_indexes"
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim"),
)
# model_type -> its configuration class's defaults for ``_SIZES`` that ``text_config`` lacks.
DEFAULTS = {
    "llama": (32000, 4096, 11008, 32, 32),
    "mistral": (32000, 4096, 14336, 32, 32, 8),
    "gemma3_text": (262208, 2304, 9216, 26, 8, 4, 256),
}


def has_vision(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` describes a model of images and text."""
    return isinstance(config.get("vision_config"), Mapping)


def decoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text decoder's settings, in the form of a standalone decoder's ``config.json``."""
    text = config.get("text_config")
    vision = config["vision_config"]
    deepstack = {DEEPSTACK: vision[DEEPSTACK]} if vision.get(DEEPSTACK) else {}
    if not isinstance(text, Mapping):
        return {**config, **deepstack}
    model_type = str(text.get("model_type", f"{config.get('model_type')}_text"))
    whole = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}
    usual = dict(zip(_SIZES, DEFAULTS.get(model_type, ()), strict=False))
    return {**usual, **text, "model_type": model_type, **whole, **deepstack}


def with_decoder(config: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """The whole ``config.json`` with its text decoder's settings (see ``decoder_config``) changed to ``decoder``."""
    before = decoder_config(config)
    changed = {key: value for key, value in decoder.items() if before.get(key) != value or key not in before}
    of_whole = {key: changed.pop(key) for key in _OF_THE_WHOLE if key in changed}
    # A head's tie is stated for the whole model only if it was before and is undone.
    if not config.get("tie_word_embeddings") or of_whole.get("tie_word_embeddings"):
        of_whole.pop("tie_word_embeddings", None)
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return {**config, **changed, **of_whole}
    return {**config, "text_config": {**text, **changed}, **of_whole}


def beside_decoder(names: Iterable[str]) -> frozenset[str]:
    """Names of the tensors outside the text decoder and its head, which are copied."""
    return frozenset(name for name in names if not name.startswith(_OF_DECODER))
