"""Where a result comes from: code, packages, machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "datasets", "lm-eval", "safetensors")


def code_version(root: Path) -> dict[str, Any]:
    """Commit of the working tree at ``root`` and the sha256 of what differs from it (None: nothing does)."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": None, "dirty_diff_sha256": None}
    changes = (_git(root, "diff", "HEAD") or "") + (_git(root, "status", "--porcelain") or "")
    dirty = hashlib.sha256(changes.encode()).hexdigest() if changes.strip() else None
    return {"git_commit": commit.strip(), "dirty_diff_sha256": dirty}


def environment() -> dict[str, Any]:
    """Versions of Python and of every package that can change a number."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"python": platform.python_version(), "packages": versions, "machine": platform.machine()}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout
