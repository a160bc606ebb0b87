"""The calibration pass as published and as in this project, in forward passes of the same model."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hfprune_launch.benchmark.published import PublishedScores
from torch import Tensor, nn
from transformers.utils import logging

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.core.head import Batch
from hfprune_dist.core.observers import SeenUnits, UnitSums
from hfprune_dist.core.score_batch import ScoredModel, score_batch
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.data.windows import Sampling, sample_windows
from hfprune_dist.errors import UserError
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
    lines = []
    for dtype in DTYPES:
        measured = _measure(model, text, dtype, tokens, rounds)
        lines += [(f"{dtype}: {what}", value, unit) for what, value, unit in measured]
    return lines


def _measure(model: str, text: str, dtype: str, tokens: int, rounds: int) -> Iterator[tuple[str, float, str]]:
    windows = iter(_read_windows(model, text, rounds + 1, tokens)[:, None])
    window: list[Tensor] = []
    causal_lm, checkpoint = _load(model, dtype)
    published = PublishedScores(causal_lm, checkpoint.units.outputs_of(causal_lm))
    scorers: dict[str, PublishedScores | Ours] = {"published": published}
    scorers |= {name: Ours(causal_lm, checkpoint, checkpointing) for name, checkpointing in OURS.items()}

    def forward() -> None:
        window[:] = [next(windows).to(causal_lm.device)]
        with torch.no_grad():
            causal_lm(input_ids=window[0], use_cache=False)

    def score(name: str) -> None:
        scorers[name].add(window[0])

    # The first round warms up: it allocates what is made only once, and loads the weights' pages.
    variants: dict[str, Callable[[], object]] = {"forward": forward, **{name: partial(score, name) for name in scorers}}
    seconds = paired_seconds(variants, rounds)
    forwards = seconds.pop("forward")
    ours = scorers["ours"]
    assert isinstance(ours, Ours)
    layers = zip(published.scores, ours.scores_LD, strict=True)
    overlap = statistics.mean(_overlap(one.double(), other) for one, other in layers)
    taken = {name: peak_bytes(partial(score, name)) for name in scorers}
    yield f"a forward of {tokens} tokens, time", statistics.median(forwards), "s"
    for name, times in seconds.items():
        ratio = statistics.median(taken / one for taken, one in zip(times, forwards, strict=True))
        yield f"{name}, time", ratio, "forwards"
    for name in OURS:
        yield f"{name}, memory", taken[name] / taken["published"], "x published"
    yield "kept by published and by ours", overlap, "of the neurons"


def paired_seconds(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round to warm up; the variants take turns, so that other work on
    the machine slows all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """The peak memory of ``run`` above what was in use before: of the GPU if there is one, else resident memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        raise UserError("memory is measured on Linux or on a GPU only")
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, so that resident memory is the memory in use
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


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

    def add(self, input_ids_BT: Tensor) -> None:
        """Add the scores of some windows."""
        sums = UnitSums(self._units, [CRITERIA[CRITERION]])
        windows = range(self._windows, self._windows + len(input_ids_BT))
        score_batch(self._model, Batch(input_ids_BT, windows, self._vocabulary, SEED), sums)
        self._windows += len(input_ids_BT)
        self.scores_LD = self.scores_LD + torch.stack([sums.sums[NEURONS, it.layer, CRITERION] for it in self._units])


def _read_windows(model: str, text: str, windows: int, tokens: int) -> Tensor:
    """Windows [windows, tokens] of the text in file ``text``, tokenized for the model."""
    whole = Path(text).read_text(encoding="utf-8")
    return sample_windows([whole], load_tokenizer(Path(model)), Sampling(windows, tokens, SEED), text)


def _load(model: str, dtype: str) -> tuple[Any, Checkpoint]:
    logging.set_verbosity_error()
    checkpoint = open_checkpoint(Path(model))
    causal_lm = load_causal_lm(checkpoint.path, getattr(torch, dtype)).eval()
    return causal_lm.to("cuda" if torch.cuda.is_available() else "cpu"), checkpoint


def _overlap(one_D: Tensor, other_D: Tensor) -> float:
    kept = round(SHARE_KEPT * len(one_D))
    first, second = (set(scores_D.topk(kept).indices.tolist()) for scores_D in (one_D, other_D))
    return len(first & second) / kept
