"""Contents of the folder of each named checkpoint: its files, its card, and an adapter that names its base model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune_dist.planning.plan import Plan
from hfprune_dist.results.base_model import CARD, BaseModel
from hfprune_dist.results.card_subject import Subject
from hfprune_dist.results.checkpoint_folders import CheckpointFolders, Contents
from hfprune_dist.results.checkpoint_names import checkpoint_names, with_digits
from hfprune_dist.results.model_card import model_card
from hfprune_dist.results.rows import DenseModel
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import read_object
from hfprune_dist.store.stage import Input, Stage

CHECKPOINTS = "checkpoints"
ADAPTER_CONFIG = "adapter/adapter_config.json"


def checkpoint_folders(out: Path, store: Store) -> CheckpointFolders:
    """The named folders of the sweep in ``out``."""
    return CheckpointFolders(out / CHECKPOINTS, store.root)


def named_checkpoints(plan: Plan, store: Store, dense: Mapping[str, DenseModel]) -> dict[str, Contents]:
    """Name -> contents of the folder, for every row whose checkpoint exists.

    Args:
        dense: model name -> facts about the dense checkpoint.
    """
    named = checkpoint_names(plan.cells)
    subjects = {name: Subject.of(name, cell, plan, store, dense[cell.model]) for name, cell in named.items()}
    return {name: _contents(subject, store) for name, subject in subjects.items() if subject is not None}


def _contents(subject: Subject, store: Store) -> Contents:
    artifact = store.handle(subject.cell.producers[-1]).artifact
    texts = {CARD: model_card(subject)}
    if subject.trained_on is not None and ADAPTER_CONFIG in subject.files:
        texts[ADAPTER_CONFIG] = _adapter_config(artifact, subject.trained_on, store)
    links = {name: artifact / name for name in subject.files if name not in texts}
    return Contents(with_digits(subject.name, subject.cell), links, texts)


def _adapter_config(artifact: Path, recover: Stage, store: Store) -> str:
    """The adapter's settings plus the model that it was trained on, which the settings in the artifact leave open."""
    config = (read_object(artifact / ADAPTER_CONFIG) or {}) | _base_of_adapter(recover, store)
    return json.dumps(config, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _base_of_adapter(recover: Stage, store: Store) -> dict[str, Any]:
    """Id and commit of the base model on the hub; otherwise its folder, relative to the current one.

    The path begins with a dot, so that it can't be taken for a name on the hub. It is None if the folder is gone.
    """
    source = recover.inputs["model"]
    model = BaseModel.of(recover.label, source)
    if model.hub_id is not None:
        return {"base_model_name_or_path": model.hub_id, "revision": model.revision}
    folder = _folder_of(source, store)
    if folder is None:
        return {"base_model_name_or_path": None}
    seen = os.path.relpath(folder)
    return {"base_model_name_or_path": seen if seen.startswith(os.pardir) else f"{os.curdir}{os.sep}{seen}"}


def _folder_of(source: Input, store: Store) -> Path | None:
    """Folder of a checkpoint that a stage read; None if it is gone."""
    if not source.is_stage:
        return folder if (folder := Path(source.location)).is_dir() else None
    handle = store.handle(source.location)
    return handle.artifact if handle.is_done() else None
