"""One model, ready to run in each compared way: forward only, as published, and as in this project."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from hfprune_launch.benchmark.published import PublishedScores
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.families import FAMILIES, Family
from hfprune_dist.core.bound_losses import Batch
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.head import NOTHING, AfterHead
from hfprune_dist.core.score_batch import ScoredModel, UnitSums, score_batch
from hfprune_dist.core.unit_outputs import UnitOutputs
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.data.windows import Sampling, sample_windows
from hfprune_dist.models.after_head import after_head
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.models.memory_efficient_backward import checkpoint_activations, use_memory_efficient_backward
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.units import Units

SEED = 0


class Subject:
    """A model with the published formulation and ours, over the same weights.

    Args:
        model: a Hugging Face causal language model; nothing else may hold a reference to it.
        family, units: its family, and its neurons.
        after: what its architecture does to the head's logits.
        checkpointing: keep only the layers' inputs (``importance`` with activation checkpointing).
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        units: Units,
        *,
        after: AfterHead = NOTHING,
        checkpointing: bool = False,
    ) -> None:
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._family = family
        self._units = units
        self._vocabulary = family.head_of(model).out_features
        self._published = PublishedScores(self._model, units.outputs_of(self._model))
        self._ours = self._scored(after, checkpointing)

    @torch.no_grad()
    def forward(self, input_ids_BT: Tensor) -> None:
        """Run a forward pass with all logits, the unit for the other ways."""
        self._model(input_ids=input_ids_BT.to(self._device), use_cache=False)

    def published(self, input_ids_BT: Tensor) -> list[Tensor]:
        """Run the published formulation; return the scores so far, [intermediate_size] for each layer."""
        self._published.add(input_ids_BT.to(self._device))
        return self._published.scores

    def ours(self, micro_batches: Sequence[Tensor], criteria: Sequence[str]) -> Tensor:
        """Score a shard as the importance stage does; return its sums, float64 [criteria, layers, neurons]."""
        chosen = [CRITERIA[name] for name in criteria]
        sums = UnitSums(self._ours.outputs, chosen)
        for number, input_ids_BT in enumerate(micro_batches):
            windows = range(number * len(input_ids_BT), (number + 1) * len(input_ids_BT))
            score_batch(self._ours, Batch(input_ids_BT.to(self._device), windows, self._vocabulary, SEED), sums)
        exact = sums.kinds[NEURONS].exact
        return torch.stack([exact[name] for name in criteria])

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _scored(self, after: AfterHead, checkpointing: bool) -> ScoredModel:
        """Return a frozen copy that shares the weights' storage."""
        shared = {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in self._model.parameters()}
        frozen = copy.deepcopy(self._model, shared)
        use_memory_efficient_backward(frozen, self._family)
        if checkpointing:
            checkpoint_activations(frozen, self._family)
        body, head = self._family.body_of(frozen), self._family.head_of(frozen)
        return ScoredModel(
            body=lambda input_ids_BT: body(input_ids=input_ids_BT, use_cache=False).last_hidden_state,
            head=lambda: contextlib.nullcontext((head.weight, head.bias)),
            outputs={NEURONS: UnitOutputs(self._units.outputs_of(frozen), self._units.channels_per_unit)},
            after=after,
        )


def load_subject(model: str, dtype: str, checkpointing: bool = False) -> Subject:
    """Load the checkpoint in folder ``model``."""
    logging.set_verbosity_error()
    checkpoint = open_checkpoint(Path(model))
    loaded, after = load_causal_lm(checkpoint.path, getattr(torch, dtype)), after_head(checkpoint)
    return Subject(loaded, checkpoint.family, checkpoint.units, after=after, checkpointing=checkpointing)


def random_subject(dtype: str, shape: dict[str, int], checkpointing: bool = False) -> Subject:
    """Return a Llama of the given shape with random weights."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**shape, attn_implementation="sdpa", tie_word_embeddings=True)
    model, family = LlamaForCausalLM(config).to(getattr(torch, dtype)), FAMILIES["llama"]
    return Subject(model, family, family.units(config.to_dict()), checkpointing=checkpointing)


def read_text(model: str, text: str, windows: int, tokens: int) -> Tensor:
    """Return windows [windows, tokens] of the text in file ``text``, tokenized for the model."""
    tokenizer = load_tokenizer(Path(model))
    whole = Path(text).read_text(encoding="utf-8")
    return sample_windows([whole], tokenizer, Sampling(windows, tokens, SEED), text).input_ids_ST


def kept_width(model: str, ratio: float) -> int:
    """Return the number of neurons that each layer keeps at a ratio of all parameters."""
    from hfprune_dist.planning.shape_target import ShapeTarget
    from hfprune_dist.planning.shapes import uniform_shape

    return uniform_shape(ShapeTarget(open_checkpoint(Path(model)), ratio, (NEURONS,), 1, model)).units[NEURONS][0]
