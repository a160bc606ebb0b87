"""Provenance of a result: its code and packages."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

CODE = ("hfprune_dist", "launch")  # folders of a clone
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "deepspeed",
    "peft",
    "accelerate",
    "datasets",
    "lm-eval",
    "safetensors",
)


def code_version(root: Path) -> dict[str, Any]:
    """Commit of the working tree at ``root``, and the sha256 of its uncommitted changes (None: there are none).

    Files that git doesn't track count by their names if they lie among the code, where they may be imported.
    """
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": None, "dirty_diff_sha256": None}
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", *CODE)
    changes = (_git(root, "diff", "HEAD") or "") + (untracked or "")
    dirty = hashlib.sha256(changes.encode(errors="surrogateescape")).hexdigest() if changes.strip() else None
    return {"git_commit": commit.strip(), "dirty_diff_sha256": dirty}


def environment() -> dict[str, Any]:
    """Versions of Python and of every package that can change a number."""
    packages = package_versions(PACKAGES)
    return {"python": platform.python_version(), "packages": packages, "machine": platform.machine()}


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Package -> its version; None if it isn't installed."""
    return {package: _version(package) for package in packages}


def releases(packages: Iterable[str]) -> dict[str, str]:
    """Package -> its release as far as results depend on it: 5.25 for 5.25.1, but 0.4.13 for 0.4.13, whose last number
    is a minor one. Packages that aren't installed are left out.
    """
    versions = {name: found for name, found in package_versions(packages).items() if found}
    return {name: ".".join(found.split(".")[: 3 if found[0] == "0" else 2]) for name, found in versions.items()}


@cache  # reads all of a package's metadata
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    """Output of git, bytes that aren't UTF-8 as surrogates; None if it fails, e.g. outside a repository."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="surrogateescape", check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
