"""A build step for setuptools that records in a wheel the commit it was built from.

It runs in the project's folder, in an environment that may contain only setuptools.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from setuptools.command.build_py import build_py

BUILD_FILE = "build.json"
PROVENANCE = Path("hfprune_dist") / "store" / "provenance.py"


class BuildWheel(build_py):  # type: ignore[misc]
    """Collects the files of a wheel."""

    def run(self) -> None:
        """Add a record of the files' origin; an editable installation looks up its commit when it runs."""
        version = runpy.run_path(str(PROVENANCE))["code_version"](Path.cwd())
        super().run()
        if not self.editable_mode:
            file = Path(self.build_lib) / "hfprune_launch" / BUILD_FILE
            file.write_text(json.dumps(version, allow_nan=False) + "\n", encoding="utf-8")
