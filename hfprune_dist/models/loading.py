"""Loading checkpoints, including those with layers of different sizes, without running code from the checkpoint; and
what their architectures do to logits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, masking_utils
from transformers.utils import logging

from hfprune_dist.checkpoints import modeling_pruned
from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.core.devices import send
from hfprune_dist.core.head import AfterHead
from hfprune_dist.errors import UserError

# transformers changes process-wide defaults while it makes a model: threads that make models at the same time would
# restore each other's, and every later model might lack its tied head.
ONE_AT_A_TIME = threading.Lock()
# Tensors that modules make in float32 in a model of any dtype, without its class saying so (hunyuan_v1_moe).
_FLOAT32 = ("gate.wg.weight",)
# Keys by which some architectures change their head's logits -> the neutral value.
_NEUTRAL = {"logits_scaling": 1.0, "logit_scale": 1.0, "lm_head_multiplier": 1.0, "final_logit_softcapping": None}
# Architectures that multiply by ``logits_scaling``; others divide by it.
_MULTIPLYING = ("hyperclovax",)


# To which text of its row each token of a forward belongs [B, T]; None if each row is a single text.
_TEXTS: ContextVar[Tensor | None] = ContextVar("texts")
_find_texts = masking_utils.find_packed_sequence_indices


@contextmanager
def packed_rows(position_ids_BT: Tensor | None, device: torch.device | None = None) -> Iterator[None]:
    """Within the context, a forward's rows hold several texts each, whose positions begin at 0, or one each (None): it
    is told so in place of transformers' question to a GPU, for whose answer the host would wait.
    """
    texts_BT = None if position_ids_BT is None else _find_texts(position_ids_BT)
    token = _TEXTS.set(texts_BT if texts_BT is None or device is None else send(texts_BT, device))
    try:
        with mock.patch.object(masking_utils, "find_packed_sequence_indices", _texts_of):
            yield
    finally:
        _TEXTS.reset(token)


def _texts_of(position_ids_BT: Tensor) -> Tensor | None:
    is_told = _TEXTS in copy_context()  # not in another thread
    texts_BT: Tensor | None = _TEXTS.get() if is_told else _find_texts(position_ids_BT)
    return texts_BT


def _run_body(body: Any, *inputs: Any, **options: Any) -> Any:
    """A body's own forward, in which rows without positions are known to be single texts."""
    with packed_rows(None) if options.get("position_ids") is None else nullcontext():
        return type(body).forward(body, *inputs, **options)


def load_causal_lm(folder: Path, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
    """Load the model of a checkpoint folder that lacks no tensor, to a device or, if an ``HfDeepSpeedConfig`` is alive,
    sharded. It doesn't pass through main memory: each rank would hold there what is converted, or stacked as experts.
    """
    checkpoint = open_checkpoint(folder)
    model, told = _loaded(checkpoint, dtype=dtype, device_map=device)
    _refuse_missing(checkpoint, told)
    for config in (model.config, model.config.get_text_config()):
        name_outputs(config)
    body: Any = checkpoint.family.body_of(model)
    body.forward = partial(_run_body, body)
    if checkpoint.family.has_vision:
        body.register_forward_pre_hook(_with_text_positions, with_kwargs=True)
    return model


def name_outputs(config: Any) -> None:
    """Have models return named outputs, and of hidden states only the last, whatever their config.json asks for."""
    config.return_dict = True
    config.output_hidden_states = False
    config.output_attentions = False


def _loaded(checkpoint: Checkpoint, **options: Any) -> tuple[PreTrainedModel, dict[str, set[Any]]]:
    """The model that transformers makes from a checkpoint, and what it tells about tensors."""
    attention = attention_of(checkpoint)  # refuses first what would need code of its own
    # A head that config.json doesn't call tied counts by itself, but the class's default may tie it. Left to itself,
    # transformers compares it with the embedding then: if both are sharded, it sees no values, and ties them.
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    default = getattr(config, "tie_word_embeddings", False)
    untie = default and not checkpoint.config.get("tie_word_embeddings")
    with ONE_AT_A_TIME:
        loaded: tuple[PreTrainedModel, dict[str, set[Any]]] = model_class(checkpoint).from_pretrained(
            checkpoint.path,
            attn_implementation=attention,
            output_loading_info=True,
            use_kernels=False,  # of a hub: code that nobody here has read, and other numbers
            **({"tie_word_embeddings": False} if untie else {}),
            **options,
        )
    return loaded


def _refuse_missing(checkpoint: Checkpoint, told: Mapping[str, set[Any]]) -> None:
    if missing := sorted(told["missing_keys"]):
        raise UserError(
            f"{checkpoint.path}: tensor {missing[0]} is missing from the weight files, or called otherwise "
            f"than {checkpoint.config['model_type']} calls it; transformers would make it up at random"
        )


def _with_text_positions(
    _body: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hook before a text decoder whose positions have several axes: tell it where the texts that share a row begin.

    The decoder looks for that in the first of four rows of positions; from a single row it makes three, and sees none.
    """
    positions = options.get("position_ids")
    rope = getattr(_body.config, "rope_parameters", None) or {}
    if positions is None or positions.ndim != 2 or "mrope_section" not in rope:
        return None
    return inputs, options | {"position_ids": positions[None].expand(4, -1, -1)}


def model_class(checkpoint: Checkpoint) -> Any:
    """The class that can hold a checkpoint's weights."""
    if checkpoint.is_plain:
        return auto_class(checkpoint)
    return getattr(modeling_pruned, checkpoint.family.pruned_class)


def auto_class(checkpoint: Checkpoint) -> Any:
    """The class of transformers that makes models of a checkpoint's architecture."""
    return AutoModelForImageTextToText if checkpoint.family.has_vision else AutoModelForCausalLM


def attention_of(checkpoint: Checkpoint) -> str:
    """The attention that a checkpoint runs with: torch's, or its own implementation if torch's can't replace it. An
    architecture for which transformers has no class is refused.
    """
    name = checkpoint.family.plain_class
    kind = getattr(transformers, name, None)
    if kind is None:
        raise UserError(
            f"{checkpoint.path / 'config.json'}: transformers has no {name}, which architectures names; a newer "
            "version may have it (pip install -U transformers), and code that comes with a checkpoint is not run"
        )
    return "sdpa" if kind._supports_sdpa else "eager"


def stays_float32(checkpoint: Checkpoint, name: str) -> bool:
    """Whether transformers keeps a tensor in float32 whatever dtype a model is loaded in, as some routers are."""
    kept = getattr(transformers, checkpoint.family.plain_class)._keep_in_fp32_modules_strict or ()
    return any(part in name for part in (*kept, *_FLOAT32))


def require_own_weights(checkpoint: Checkpoint) -> None:
    """Refuse weights that, by their headers, aren't those of the model that config.json describes, or a model that
    transformers can't make: it fills missing tensors with random values, and leaves out those that it has no use for.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        _, told = _loaded(checkpoint, device_map="meta", ignore_mismatched_sizes=True)
    except UserError:
        raise
    except Exception as error:  # of many kinds, depending on the settings
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{checkpoint.path / 'config.json'}: transformers can't make this model: {reason}") from None
    _refuse_missing(checkpoint, told)
    for name, found, wanted in sorted(told["mismatched_keys"]):
        raise UserError(f"{checkpoint.path}: {name} has shape {list(found)}, but config.json makes it {list(wanted)}")
    tied = {checkpoint.family.head_tensor} if checkpoint.config.get("tie_word_embeddings") else set()
    ours = {stored for name in checkpoint.tensors for stored in (name, checkpoint.names.in_files(name))}
    for name in sorted((told["unexpected_keys"] & ours) - tied):
        raise UserError(
            f"{checkpoint.path}: transformers would leave out the tensor {name}, which config.json gives no place"
        )


def after_head(checkpoint: Checkpoint) -> AfterHead:
    """What a checkpoint's architecture does to its logits, as far as its config.json tells."""
    config: Any = AutoConfig.from_pretrained(checkpoint.path).get_text_config()
    stated: dict[str, Any] = {key: getattr(config, key, None) or neutral for key, neutral in _NEUTRAL.items()}
    scaling = stated["logits_scaling"]
    scale = stated["logit_scale"] * stated["lm_head_multiplier"]
    scale *= scaling if checkpoint.family.model_type in _MULTIPLYING else 1 / scaling
    return AfterHead(scale, stated["final_logit_softcapping"])
