"""Sections ``pass`` and ``criteria``: the cost of the calibration pass, in forward passes."""

from __future__ import annotations

from typing import Any

import torch
from hfprune_launch.benchmark.isolated import TIDY, call
from hfprune_launch.benchmark.measure import paired_ratios, peak_bytes
from hfprune_launch.benchmark.results import Findings, Line
from hfprune_launch.benchmark.settings import RATIO, Settings
from hfprune_launch.benchmark.subject import Subject, kept_width, load_subject, read_text
from torch import Tensor

DTYPES = ("float32", "bfloat16")
# Each needs a backward pass of its own.
GRADIENT_CRITERIA = ("entropy", "cross_entropy", "fisher", "fisher_signs")
TIME_TARGETS = {"float32": 2.2, "bfloat16": 2.3}
MEMORY_TARGETS = {"bfloat16": 0.25}
CRITERIA_NUMBERS = (1, 2, 3, 4)
CRITERIA_TARGETS = {4: 2.6}
METHODS = ("forward", "published", "ours", "ours, activations checkpointed")


def measure_pass(settings: Settings) -> Findings:
    """Measure time, memory and kept neurons of the published formulation and of ours."""
    lines: list[Line] = []
    kept: dict[str, Any] = {}
    for dtype in DTYPES:
        where = {"model": settings.model, "text": settings.text, "dtype": dtype, "tokens": settings.tokens}
        timed = call(f"{__name__}:time_pass", {**where, "rounds": settings.rounds}, {})
        taken = {
            method: call(f"{__name__}:take_memory", {**where, "method": method}, TIDY)
            for method in ("published", "ours", "ours, activations checkpointed")
        }
        kept |= {f"{method} {dtype}": layers for method, layers in timed["kept"].items()}
        for method in METHODS[1:]:
            target = TIME_TARGETS[dtype] if method == "ours" else None
            lines.append(Line("pass", f"{dtype}: {method}, time", timed["ratios"][method], "forwards", target))
        for method in METHODS[2:]:
            target = MEMORY_TARGETS.get(dtype) if method == "ours" else None
            share = taken[method] / taken["published"]
            lines.append(Line("pass", f"{dtype}: {method}, memory above the model", share, "x published", target))
    pairs = [(f"published {dtype}", f"ours {dtype}") for dtype in DTYPES] + [("ours bfloat16", "ours float32")]
    for one, other in [*pairs, ("published bfloat16", "ours float32")]:
        lines.append(Line("pass", f"kept by {one} and by {other}", _overlap(kept[one], kept[other]), "share"))
    return Findings(lines)


def measure_criteria(settings: Settings) -> Findings:
    """Measure the cost of further criteria in the same pass."""
    ratios = call(
        f"{__name__}:time_criteria",
        {"model": settings.model, "text": settings.text, "tokens": settings.tokens, "rounds": settings.rounds},
        {},
    )
    return Findings(
        [
            Line("criteria", f"bfloat16: {number} from one forward, time", ratio, "x one", CRITERIA_TARGETS.get(number))
            for number, ratio in zip(CRITERIA_NUMBERS, ratios, strict=True)
        ]
    )


def time_pass(model: str, text: str, dtype: str, tokens: int, rounds: int) -> dict[str, Any]:
    """In a separate process: time ratios to a forward pass, and the neurons that each method keeps, layer by layer."""
    windows = iter(read_text(model, text, rounds + 1, tokens)[:, None])
    plain, checkpointed = load_subject(model, dtype), load_subject(model, dtype, checkpointing=True)
    sums: list[Tensor] = []
    published: list[Tensor] = []
    window: list[Tensor] = []

    def forward() -> None:
        window[:] = [next(windows)]
        plain.forward(window[0])

    def run_published() -> None:
        published[:] = plain.published(window[0])

    ratios = paired_ratios(
        {
            "forward": forward,
            "published": run_published,
            "ours": lambda: sums.append(plain.ours(window, ["entropy"])),
            "ours, activations checkpointed": lambda: checkpointed.ours(window, ["entropy"]),
        },
        "forward",
        rounds,
    )
    width = kept_width(model, RATIO)
    ours = torch.stack(sums).sum(dim=0)[0]
    return {"ratios": ratios, "kept": {"published": _kept(published, width), "ours": _kept(list(ours), width)}}


def take_memory(model: str, text: str, dtype: str, tokens: int, method: str) -> int:
    """In a separate process: bytes above the model at a method's peak."""
    windows = read_text(model, text, 1, tokens)
    subject = load_subject(model, dtype, checkpointing=method.endswith("checkpointed"))
    run_method(subject, method, windows[:, :8])  # allocates what is made only once, and loads the weights' pages
    return peak_bytes(lambda: run_method(subject, method, windows))


def time_criteria(model: str, text: str, tokens: int, rounds: int) -> list[float]:
    """In a separate process: time for each of ``CRITERIA_NUMBERS`` gradient criteria, in multiples of that for one."""
    windows = read_text(model, text, 1, tokens)
    subject = load_subject(model, "bfloat16")

    def run(number: int) -> None:
        subject.ours([windows], GRADIENT_CRITERIA[:number])

    variants = {str(number): lambda number=number: run(number) for number in CRITERIA_NUMBERS}
    return list(paired_ratios(variants, "1", rounds).values())


def run_method(subject: Subject, method: str, input_ids_BT: Tensor) -> None:
    """Run one micro-batch with one of ``METHODS``."""
    if method == "forward":
        subject.forward(input_ids_BT)
    elif method == "published":
        subject.published(input_ids_BT)
    else:
        subject.ours([input_ids_BT], ["entropy"])


def _kept(scores: list[Tensor], width: int) -> list[list[int]]:
    return [scores_D.double().topk(width).indices.tolist() for scores_D in scores]


def _overlap(one: list[list[int]], other: list[list[int]]) -> float:
    shared = sum(len(set(a) & set(b)) for a, b in zip(one, other, strict=True))
    return shared / sum(map(len, one))
