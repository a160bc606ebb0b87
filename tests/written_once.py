"""Folders of files that many tests write alike: made once in each process, and from then on only copied."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

MOST = 100
_made: dict[str, tuple[dict[str, bytes], torch.Tensor]] = {}


def write_once(folder: Path, key: str, make: Callable[[Path], object]) -> Path:
    """Let a folder have what ``make`` writes, and torch its random state; it runs once per ``key``, of the last few."""
    if key not in _made:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name))
            files = {file.name: file.read_bytes() for file in Path(name).iterdir()}
        _made[key] = files, torch.get_rng_state()
    files, state = _made[key] = _made.pop(key)
    if len(_made) > MOST:
        del _made[next(iter(_made))]
    torch.set_rng_state(state)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
