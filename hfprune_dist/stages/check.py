"""Check: a checkpoint in an engine, held against transformers. It has a single rank, which only waits for both."""

from __future__ import annotations

import sys
from dataclasses import asdict

from hfprune_dist.engines.check import check
from hfprune_dist.kinds.check import CheckParameters
from hfprune_dist.stages.context import Context
from hfprune_dist.store.atomic_files import write_json

RESULTS = "check.json"


def run(context: Context[CheckParameters]) -> None:
    """Write ``check.json``; an engine that doesn't load the checkpoint, or computes something else, is a result."""
    engine = context.params.engine
    python = context.runtime.engine_pythons.get(engine, sys.executable)
    context.progress.update(engine, 0, 1)
    found = context.world.on_rank0(lambda: asdict(check(engine, context.input_path("model"), python)))
    draft = context.open_draft()
    context.world.on_rank0(lambda: write_json(draft / RESULTS, found))
    context.commit(draft, found)
