"""Locations of the project's own files, in a clone or in the packages installed from a wheel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hfprune_dist
from hfprune_dist.store.atomic_files import read_json
from hfprune_dist.store.provenance import code_version

BUILD_FILE = "build.json"  # in a wheel; written by build_steps.py


@dataclass(frozen=True)
class Project:
    """The folders of the project."""

    packages: Mapping[str, Path]  # package name -> folder of its modules
    configs: Path  # of configurations, methods and model aliases (``configs``)
    profiles: Path  # of Slurm profiles (``slurm/profiles``)

    @classmethod
    def around(cls, launch: Path) -> Project:
        """Return the project that the folder of the package ``hfprune_launch`` belongs to."""
        packages = {"hfprune_dist": launch.parent / "hfprune_dist", "hfprune_launch": launch}
        if (launch / "configs").is_dir():  # a wheel's
            return cls(packages, launch / "configs", launch / "profiles")
        return cls(packages, launch.parent / "configs", launch.parent / "slurm" / "profiles")

    def code_version(self) -> dict[str, Any]:
        """Return version and commit of the code: the current ones in a clone, those of its build in a wheel."""
        launch = self.packages["hfprune_launch"]
        built = read_json(launch / BUILD_FILE) or code_version(launch.parent)
        return {"hfprune_dist": hfprune_dist.__version__, **built}


PROJECT = Project.around(Path(__file__).resolve().parent)
