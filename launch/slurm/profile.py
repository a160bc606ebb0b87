"""Profiles: resources to ask a Slurm cluster for, for all stages and for each kind of stage (slurm/profiles/*.yaml)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hfprune_dist.config.load import absolute_path, parse
from hfprune_dist.config.parameters import KINDS
from hfprune_dist.config.section import UNPRINTABLE, Positive, Section
from hfprune_dist.config.yaml_text import read_yaml
from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.store.stage import kind_of

StageName = Literal[*KINDS]  # type: ignore[valid-type]
# Units of Slurm's --mem; megabytes if none is given.
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Options of sbatch that a sweep sets, some of them from other keys, or that would keep sbatch from saying a job's id at
# once. Which cluster is asked is for SLURM_CLUSTERS to say, as all of Slurm's commands have to find the jobs there.
OWN_OPTIONS = {
    *("nodes", "ntasks", "ntasks-per-node", "tasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "time"),
    *("partition", "account", "qos", "constraint", "exclude", "cluster", "clusters", "dependency", "chdir", "job-name"),
    *("kill-on-invalid-dep", "requeue", "no-requeue", "array", "output", "error", "open-mode", "wait", "test-only"),
    *("signal", "comment"),
}


class Resources(Section):
    """Resources that one job asks for. Null leaves a setting to the cluster's default."""

    partition: str | None = None
    """Partition; several may be given, separated by commas."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    nodes: Positive = 1
    """Nodes of a job."""
    tasks_per_node: Positive = 1
    """Ranks on each node; on a GPU cluster, one per GPU."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs on each node; 0 asks for none."""
    gpu_type: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """Type of these GPUs, as the cluster calls it, e.g. a100 (sinfo -o %G lists gpu:a100:8); some clusters require it.
    Null takes any."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU; with it, plans that can't fit are refused before anything is submitted."""
    cpus_per_task: Positive = 1
    """CPU cores of each rank; also its number of threads, unless runtime.threads_per_rank is set, or OMP_NUM_THREADS is
    and is smaller where the sweep is started, as on some login nodes."""
    memory: Annotated[str, Field(pattern=r"^\d+([KMGTkmgt][Bb]?)?$")] | None = None
    """Main memory per node, in Slurm's notation, e.g. 200G."""
    time_minutes: Positive = 60
    """Time limit of one job. If a stage needs longer, its job is requeued and resumes where it stopped."""
    signal_seconds: Annotated[int, Field(ge=10)] = 120
    """Seconds before the time limit at which a job is asked to save; longer than a save and the work between two."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes that must not be used, e.g. node[07-09]."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines that run on the first node of a job before the ranks start, e.g. module load git; the first that
    fails ends the job. Neither CUDA nor a Python is needed."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(default_factory=dict)
    """Environment variables of all ranks."""
    sbatch: dict[str, str | int | bool | None] = Field(default_factory=dict)
    """More sbatch options, without the dashes: {reservation: week4, exclusive: true}; false or null leaves one out."""
    srun_args: list[str] = Field(default_factory=list)
    """Further arguments of srun."""

    @field_validator("partition", "account", "qos", "constraint", "exclude", "sbatch")
    @classmethod
    def _in_one_line(cls, given: Any) -> Any:
        """Refuse what would end its line of the batch script, and backslashes, which sbatch removes even in quotes."""
        for text in given.values() if isinstance(given, dict) else [given]:
            if isinstance(text, str) and ("\\" in text or UNPRINTABLE.search(text)):
                raise ValueError(f"{text!r} has a character that a line of a batch script can't have")
        return given

    @field_validator("sbatch")
    @classmethod
    def _of_others(cls, sbatch: dict[str, Any]) -> dict[str, Any]:
        for name in sbatch:
            if not re.fullmatch("[a-z][a-z0-9-]+", name):
                raise ValueError(f"{name!r}: give an option's long name, with dashes only between words: mem-per-cpu")
        if taken := sorted(sbatch.keys() & OWN_OPTIONS):
            raise ValueError(f"{taken[0]} is not to be given there; a key, the sweep, or SLURM_CLUSTERS sets it")
        return {name: value for name, value in sbatch.items() if value is not False and value is not None}

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Resources:
        if self.signal_seconds > 60 * self.time_minutes:
            raise ValueError(f"signal_seconds {self.signal_seconds} is more than time_minutes {self.time_minutes}")
        if 0 < self.gpus_per_node < self.tasks_per_node:
            raise ValueError(
                f"tasks_per_node {self.tasks_per_node} is more than gpus_per_node {self.gpus_per_node}; a rank needs a "
                "GPU of its own"
            )
        return self

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def memory_bytes(self) -> float | None:
        """Main memory per node in bytes; None if it is the cluster's default, or all of it."""
        found = re.match(r"(\d+)([KMGT]?)", self.memory or "", re.IGNORECASE)
        if found is None or int(found[1]) == 0:
            return None
        return float(int(found[1]) * UNITS[found[2].upper() or "M"])

    def device(self, threads: int) -> str:
        """Describe the device of a rank with so many threads, as far as the profile specifies it."""
        asked = {"partition": self.partition, "constraint": self.constraint, "gres": self.sbatch.get("gres")}
        asked["gpu_type"] = self.gpu_type if self.gpus else None
        told = [f"{name} {value}" for name, value in asked.items() if value is not None]
        return ", ".join([*told, "a GPU" if self.gpus else f"threads: {threads}"])


class ProfileFile(Resources):
    """A whole file: resources of all stages, and the settings that differ for some kinds."""

    max_running: Positive | None = None
    """The most jobs of a sweep that run at once; null: as many as the cluster allows."""
    stages: dict[StageName, dict[str, Any]] = Field(default_factory=dict)
    """Kind of stage -> the settings that differ for it. In environment and sbatch, the keys given here are added or
    replaced, or removed if they are null; setup and srun_args are replaced as a whole."""


@dataclass(frozen=True)
class Profile:
    """A checked profile, with the resources of each kind of stage."""

    resources: Mapping[str, Resources]
    max_running: int | None

    def allocation(self, stage_id: str) -> Mapping[str, Any]:
        """Return what a stage wants of a job, which may run others that want the same: all but its time limit."""
        return self.resources[kind_of(stage_id)].model_dump(exclude={"time_minutes", "signal_seconds"})

    def of_job(self, kinds: Sequence[str]) -> Resources:
        """Return the resources of a job that runs stages of these kinds: they differ in their time limits alone."""
        resources = [self.resources[kind] for kind in kinds]
        limits = {key: max(getattr(each, key) for each in resources) for key in ("time_minutes", "signal_seconds")}
        return resources[0].model_copy(update=limits)


def load_profile(name: str, shipped: Path) -> Profile:
    """Read a profile, given the name of a shipped one or a path, and check it."""
    file = _find(name, shipped)
    raw = read_yaml(file, "--profile", "keys and values at the top level")
    whole = parse(ProfileFile, raw, str(file))
    common = whole.model_dump(exclude={"stages", "max_running"})
    resources = {
        kind: parse(Resources, _settings(common, whole.stages, kind), f"{file}: stages.{kind}") for kind in KINDS
    }
    told = [key for key in ("gpu_type", "gpu_memory_gib") if any(getattr(asked, key) for asked in resources.values())]
    if told and not any(asked.gpus for asked in resources.values()):
        raise UserError(f"{file}: {told[0]} tells of GPUs, but no kind of stage asks for any; set gpus_per_node")
    return Profile(resources, whole.max_running)


def _settings(common: Mapping[str, Any], stages: Mapping[Any, Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """Return the settings of all stages, overridden by a kind's own; LoRAPrune, being a recovery, has those of recovery
    unless it has its own. A kind that runs on one rank, in jobs of its own, takes at most one of the GPUs.
    """
    if KINDS[kind].on_one_rank and kind in stages:
        common = {**common, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": min(1, common["gpus_per_node"])}
    own = stages.get(kind, stages.get("recover", {}) if KINDS[kind].trains else {})
    merged = {**common, **own}
    for key in ("environment", "sbatch"):
        if isinstance(own.get(key), dict):
            both = {**common[key], **own[key]}
            merged[key] = {name: value for name, value in both.items() if value is not None}
    return merged


def _find(name: str, shipped: Path) -> Path:
    names = sorted(file.stem for file in shipped.glob("*.yaml"))
    if name in names:
        return shipped / f"{name}.yaml"
    file = Path(absolute_path(name, Path.cwd()))
    if not file.is_file():
        raise UserError(
            f"--profile: no profile {name!r}{did_you_mean(name, names)}; valid: {', '.join(names)} (slurm/profiles), "
            "or the path of a YAML file"
        )
    return file
