"""Build steps for setuptools that record in a wheel the commit it was built from.

They run in the project's folder, in an environment that may contain only setuptools.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

BUILD_FILE = "build.json"
PROVENANCE = Path("hfprune_dist") / "store" / "provenance.py"


def _built_from() -> dict[str, Any]:
    """Return the version and commit of the working tree, or those recorded in a source distribution."""
    told = Path("launch") / BUILD_FILE
    if told.is_file():
        content: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
        return content
    version: dict[str, Any] = runpy.run_path(str(PROVENANCE))["code_version"](Path.cwd())
    return version


def _write(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BUILD_FILE).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


class BuildWheel(build_py):  # type: ignore[misc]
    """Collects the files of a wheel."""

    def run(self) -> None:
        """Add a record of the files' origin; an editable installation looks up its commit when it runs."""
        version = _built_from()
        super().run()
        if not self.editable_mode:
            _write(Path(self.build_lib) / "hfprune_launch", version)


class BuildSource(sdist):  # type: ignore[misc]
    """Collects the files of a source distribution."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Add a record of the files' origin."""
        version = _built_from()  # before the new files count as a change of the working tree
        super().make_release_tree(base_dir, files)
        _write(Path(base_dir) / "launch", version)
