"""Section ``pass``: the calibration pass as published and as in this project, in forward passes of the same model."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hfprune_launch.benchmark.measurement import TIDY, call, median_ratio, paired_seconds, peak_bytes
from hfprune_launch.benchmark.published import PublishedScores
from torch import Tensor, nn
from transformers.utils import logging

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.core.head import Batch
from hfprune_dist.core.observers import SeenUnits, UnitSums
from hfprune_dist.core.score_batch import ScoredModel, score_batch
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.data.windows import Sampling, sample_windows
from hfprune_dist.methods import CRITERIA
from hfprune_dist.models.after_head import after_head
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.models.memory_efficient_backward import checkpoint_activations, use_memory_efficient_backward
from hfprune_dist.structures import NEURONS

SEED = 0
DTYPES = ("float32", "bfloat16")
OURS = {"ours": False, "ours, activations checkpointed": True}  # name -> whether only the layers' inputs are kept
CRITERION = "entropy"
# At which kept sets are compared: as many neurons as a ratio of 0.2 leaves in most models.
SHARE_KEPT = 0.7


def measure_pass(model: str, text: str, tokens: int, rounds: int) -> list[tuple[str, float, str]]:
    """Measure time, memory and kept neurons of both formulations: what, value, unit."""
    lines: list[tuple[str, float, str]] = []
    for dtype in DTYPES:
        where = {"model": model, "text": text, "dtype": dtype, "tokens": tokens}
        timed = call(f"{__name__}:time_pass", {**where, "rounds": rounds}, {})
        taken = {name: call(f"{__name__}:take_memory", {**where, "name": name}, TIDY) for name in ("published", *OURS)}
        lines.append((f"{dtype}: a forward of {tokens} tokens, time", timed["forward"], "s"))
        lines += [(f"{dtype}: {name}, time", ratio, "forwards") for name, ratio in timed["ratios"].items()]
        lines += [(f"{dtype}: {name}, memory", taken[name] / taken["published"], "x published") for name in OURS]
        lines.append((f"{dtype}: kept by published and by ours", timed["overlap"], "of the neurons"))
    return lines


def time_pass(model: str, text: str, dtype: str, tokens: int, rounds: int) -> dict[str, Any]:
    """In a separate process: seconds of a forward pass, time ratios to it, and the share of neurons both keep."""
    windows = iter(read_windows(model, text, rounds + 1, tokens)[:, None])
    window: list[Tensor] = []
    causal_lm, checkpoint = _load(model, dtype)
    scorers = {name: Ours(causal_lm, checkpoint, checkpointing) for name, checkpointing in OURS.items()}
    published = PublishedScores(causal_lm, checkpoint.units.outputs_of(causal_lm))

    def forward() -> None:
        window[:] = [next(windows).to(causal_lm.device)]
        with torch.no_grad():
            causal_lm(input_ids=window[0], use_cache=False)

    variants = {"forward": forward, "published": lambda: published.add(window[0])}
    variants |= {name: partial(ours.add, window) for name, ours in scorers.items()}
    seconds = paired_seconds(variants, rounds)
    forwards = seconds.pop("forward")
    layers = zip(published.scores, scorers["ours"].scores_LD, strict=True)
    return {
        "forward": statistics.median(forwards),
        "ratios": {name: median_ratio(times, forwards) for name, times in seconds.items()},
        "overlap": statistics.mean(_overlap(one.double(), other) for one, other in layers),
    }


def take_memory(model: str, text: str, dtype: str, tokens: int, name: str) -> int:
    """In a separate process: bytes above the model at the peak of scoring one window."""
    causal_lm, checkpoint = _load(model, dtype)
    window = read_windows(model, text, 1, tokens).to(causal_lm.device)
    if name == "published":
        published = PublishedScores(causal_lm, checkpoint.units.outputs_of(causal_lm))
        published.add(window[:, :8])  # allocates what is made only once, and loads the weights' pages
        return peak_bytes(lambda: published.add(window))
    ours = Ours(causal_lm, checkpoint, OURS[name])
    ours.add([window[:, :8]])
    return peak_bytes(lambda: ours.add([window]))


class Ours:
    """Scores neurons as the importance stage does.

    Args:
        causal_lm: a Hugging Face causal language model, of which this keeps a frozen copy that shares its weights.
        checkpointing: keep only the layers' inputs (``importance`` with activation checkpointing).
    """

    def __init__(self, causal_lm: Any, checkpoint: Checkpoint, checkpointing: bool = False) -> None:
        family = checkpoint.family
        shared = {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in causal_lm.parameters()}
        frozen = copy.deepcopy(causal_lm, shared)
        use_memory_efficient_backward(frozen, family)
        if checkpointing:
            checkpoint_activations(frozen, family)
        body, head = family.body_of(frozen), family.head_of(frozen)
        self._vocabulary = head.out_features
        self._model = ScoredModel(
            body=lambda input_ids_BT: body(input_ids=input_ids_BT, use_cache=False).last_hidden_state,
            head=lambda: contextlib.nullcontext((head.weight, head.bias)),
            after=after_head(checkpoint),
        )
        outputs = checkpoint.units.outputs_of(frozen)
        self._units = [SeenUnits(NEURONS, layer, output) for layer, output in enumerate(outputs)]
        self._windows = 0
        self.scores_LD = torch.zeros(())

    def add(self, micro_batches: Sequence[Tensor]) -> None:
        """Add the scores of a shard."""
        sums = UnitSums(self._units, [CRITERIA[CRITERION]])
        for input_ids_BT in micro_batches:
            windows = range(self._windows, self._windows + len(input_ids_BT))
            score_batch(self._model, Batch(input_ids_BT, windows, self._vocabulary, SEED), sums)
            self._windows += len(input_ids_BT)
        self.scores_LD = self.scores_LD + torch.stack([sums.sums[NEURONS, it.layer, CRITERION] for it in self._units])


def read_windows(model: str, text: str, windows: int, tokens: int) -> Tensor:
    """Windows [windows, tokens] of the text in file ``text``, tokenized for the model."""
    whole = Path(text).read_text(encoding="utf-8")
    return sample_windows([whole], load_tokenizer(Path(model)), Sampling(windows, tokens, SEED), text).input_ids_ST


def _load(model: str, dtype: str) -> tuple[Any, Checkpoint]:
    logging.set_verbosity_error()
    checkpoint = open_checkpoint(Path(model))
    causal_lm = load_causal_lm(checkpoint.path, getattr(torch, dtype)).eval()
    return causal_lm.to("cuda" if torch.cuda.is_available() else "cpu"), checkpoint


def _overlap(one_D: Tensor, other_D: Tensor) -> float:
    kept = round(SHARE_KEPT * len(one_D))
    first, second = (set(scores_D.topk(kept).indices.tolist()) for scores_D in (one_D, other_D))
    return len(first & second) / kept
