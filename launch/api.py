"""Python interface for notebooks: score, prune and compare models; ``prune`` makes one smaller checkpoint.

Stages run in separate processes, one rank per GPU, so they take no memory in the notebook's own process. The store and
the results are those of ``launch/sweep.py``; each reuses what the other has made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hfprune_launch.command import expanded_path, path_given
from hfprune_launch.prepare import Request, prepare
from hfprune_launch.prune import prune
from hfprune_launch.run import make, only, run_to_tables
from hfprune_launch.screen import make_console
from hfprune_launch.sweep_folder import read_sweep
from numpy.typing import NDArray
from safetensors.numpy import load_file

from hfprune_dist.config.load import from_command_line
from hfprune_dist.results.rows import Row
from hfprune_dist.store.stage import CUTTING, kind_of
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, NEURONS, SHARED_NEURONS
from hfprune_dist.structures.score_names import SCORES, scores_of_layers

__all__ = ["Session", "prune", "read_scores"]


class Session:
    """A sweep in a folder. Each method runs the stages that its result needs and the folder lacks, and shows progress.

    Paths are relative to the current folder, as it is when the session is made.

    Args:
        out: the folder; whatever a session or ``launch/sweep.py`` has made there before is reused.
        config: a YAML file, as for ``--config``. By default the folder's own ``config.yaml``, if it has one.
        settings: sections and keys of ``config/schema.py``, which override the file key by key:
            ``ratios=[0.2], calibration={"samples": 64}``.

    Raises:
        UserError: for bad input, also by the methods.
        RuntimeError: by ``score`` and ``prune``, if a stage fails.
    """

    def __init__(self, out: str | Path, config: str | Path | None = None, **settings: Any) -> None:
        files = [] if config is None else [expanded_path(str(config))]
        # A file that isn't there may be one of the project's own, which is found by its name.
        files = [file.absolute() if file.exists() else file for file in files]
        plain = json.dumps(settings, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
        overrides = from_command_line(json.loads(plain))
        self._request = Request(path_given(str(out)).absolute(), make_console(), files, overrides)

    def score(self) -> dict[str, dict[str, list[NDArray[np.float64]]]]:
        """Score the neurons of the dense models.

        Returns:
            model -> criterion -> one float64 array [intermediate_size] per layer; neurons with higher scores are kept.
        """
        prepared = prepare(self._request, download=True)
        stages = prepared.sweep.plan.stages.values()
        passes = [stage for stage in stages if stage.kind == "importance" and not stage.needs]
        make(only(prepared, [stage.id for stage in passes]))
        store = prepared.sweep.store
        return {stage.label: read_scores(store.handle(stage.id).artifact) for stage in passes}

    def prune(self) -> dict[tuple[str, float, str], Path]:
        """Make the pruned checkpoints as they are before recovery, or after it for methods that prune during recovery.

        Returns:
            (model, ratio, method) -> a folder that ``AutoModelForCausalLM.from_pretrained`` loads, with
            ``trust_remote_code`` if layers differ in shape.
        """
        prepared = prepare(self._request, download=True)
        made: dict[tuple[str, float, str], str] = {}
        for cell in prepared.sweep.plan.cells:
            if cell.ratio is not None and cell.method is not None and not cell.rounds:
                cut = next(stage_id for stage_id in cell.producers if kind_of(stage_id) in CUTTING)
                made[cell.model, cell.ratio, cell.method] = cut
        make(only(prepared, made.values()))
        return {key: prepared.sweep.store.handle(stage_id).artifact for key, stage_id in made.items()}

    def compare(self) -> list[Row]:
        """Recover and evaluate all models, pruned and dense; write and show the tables.

        Returns:
            the rows of ``results.json``: ``checkpoint`` is a folder, relative to ``out``; a row whose ``status`` is
            ``failed`` or ``missing`` has a ``cause``.
        """
        run_to_tables(prepare(self._request, download=True))
        return read_sweep(self._request.out).rows()


def read_scores(importance: Path) -> dict[str, list[NDArray[np.float64]]]:
    """Criterion -> its scores of every layer's neurons, from an importance artifact; those of experts are concatenated.
    If only whole experts were scored, their scores.
    """
    stored, scores = load_file(importance / SCORES), {}
    for name in sorted({key.rpartition(".")[2] for key in stored}):  # the names of criteria
        of_mlps = (NEURONS, EXPERT_NEURONS, SHARED_NEURONS)
        of_kinds = [found for kind in of_mlps if (found := scores_of_layers(stored, name, kind))]
        of_kinds = of_kinds or [scores_of_layers(stored, name, EXPERTS)]
        scores[name] = [np.concatenate(layer) for layer in zip(*of_kinds, strict=True)]
    return scores
