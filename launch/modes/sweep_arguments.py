"""The parsed command line of launch/sweep.py."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune_launch.project import PROJECT
from hfprune_launch.screen import say
from hfprune_launch.slurm.profile import Profile, load_profile
from hfprune_launch.sweep_folder import configuration
from rich.console import Console

from hfprune_dist.config.load import parse_assignments, parse_list, parse_ratios
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store


@dataclass(frozen=True)
class Command:
    """One call of launch/sweep.py: its arguments, and where it writes and prints."""

    arguments: Namespace
    out: Path
    console: Console

    @property
    def store(self) -> Store:
        return Store(self.out / "store")

    def tell(self, text: str) -> None:
        """Print a line as it is; nothing if it is empty."""
        if text:
            say(self.console, text)

    def configuration(self) -> SweepConfig:
        """Return the configuration, and print where it comes from unless that is obvious.

        Raises:
            UserError: for bad input.
        """
        config, remark = configuration(self.out, self.arguments.config, self.overrides())
        self.tell(remark)
        return config

    def overrides(self) -> dict[str, Any]:
        """Return command-line flags as dotted keys; a dedicated flag wins over --set."""
        arguments = self.arguments
        overrides = parse_assignments(arguments.set)
        if arguments.models is not None:
            overrides["models"] = parse_list("--models", arguments.models)
        if arguments.ratios is not None:
            overrides["ratios"] = parse_ratios(arguments.ratios)
        if arguments.methods is not None:
            overrides["methods"] = parse_list("--methods", arguments.methods)
        if arguments.criteria is not None:
            overrides["importance.criteria"] = parse_list("--criteria", arguments.criteria)
        if arguments.ranks is not None:
            overrides["runtime.ranks"] = arguments.ranks
        return overrides

    def profile(self) -> Profile | None:
        """Return the profile of the cluster to run on; None for this machine.

        Raises:
            UserError: for flags that don't go together, or an invalid profile.
        """
        arguments = self.arguments
        if arguments.backend == "slurm" and arguments.profile is None:
            raise UserError("--backend slurm: needs --profile, which says what to ask the cluster for (slurm/profiles)")
        if arguments.max_running is not None and arguments.max_running < 1:
            raise UserError(f"--max-running {arguments.max_running}: must be at least 1")
        if arguments.profile is None or arguments.backend == "local":
            self._refuse_flags_of_slurm()
            return None
        if arguments.ranks is not None:
            raise UserError(f"--ranks {arguments.ranks}: with --profile, its nodes and tasks_per_node say how many")
        return load_profile(arguments.profile, PROJECT.profiles)

    def _refuse_flags_of_slurm(self) -> None:
        limit = self.arguments.max_running
        if limit is not None:
            raise UserError(f"--max-running {limit}: only with jobs on Slurm (--profile); here stages run one by one")
        if self.arguments.follow is False:
            raise UserError("--no-follow: only with jobs on Slurm (--profile); stages here end with this command")
