"""Check: a checkpoint in engines, held against transformers. It has a single rank, and the engines their processes."""

from __future__ import annotations

from dataclasses import asdict

from hfprune_dist.engines.check import check
from hfprune_dist.kinds.check import CheckParameters
from hfprune_dist.stages.context import Context


def run(context: Context[CheckParameters]) -> None:
    """Note what engines make of the checkpoint: that one doesn't load it, or computes something else, is a result."""
    context.progress.update("engines", 0, 1)
    pythons = {engine: context.runtime.python_of(engine) for engine in context.params.engines}
    checks = check(context.input_path("model"), pythons, context.work)
    metrics = {"engines": {engine: asdict(found) for engine, found in checks.items()}}
    context.commit(context.open_draft(), metrics)
