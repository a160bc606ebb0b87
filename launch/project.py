"""Locations of the project's own files, in a clone or in the packages installed from a wheel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hfprune_dist
from hfprune_dist.store.atomic_files import read_json
from hfprune_dist.store.provenance import code_version

# In a wheel, and in the folder launch of a source distribution; written by build_steps.py.
BUILD_FILE = "build.json"


@dataclass(frozen=True)
class Project:
    """The folders of the project.

    Attributes:
        clone: top folder of the clone; None for an installed wheel, which has no git repository.
        packages: package name -> folder of its modules.
        configs: folder of configurations, methods and model aliases (``configs``).
        profiles: folder of Slurm profiles (``slurm/profiles``).
    """

    clone: Path | None
    packages: Mapping[str, Path]
    configs: Path
    profiles: Path

    @classmethod
    def around(cls, launch: Path) -> Project:
        """Return the project that the folder of the package ``hfprune_launch`` belongs to."""
        top = launch.parent
        packages = {"hfprune_dist": top / "hfprune_dist", "hfprune_launch": launch}
        if (launch / "configs").is_dir():
            return cls(None, packages, launch / "configs", launch / "profiles")
        return cls(top, packages, top / "configs", top / "slurm" / "profiles")

    def code_version(self) -> dict[str, Any]:
        """Return version and commit of the code: the current ones in a clone, those of its build in a wheel."""
        version = {"hfprune_dist": hfprune_dist.__version__}
        if self.clone is not None:
            return version | code_version(self.clone)
        built = read_json(self.packages["hfprune_launch"] / BUILD_FILE)
        return version | (built or {"git_commit": None, "dirty_diff_sha256": None})


PROJECT = Project.around(Path(__file__).resolve().parent)
