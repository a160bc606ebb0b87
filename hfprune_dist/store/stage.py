"""A stage: one unit of work with one artifact, identified by everything that its result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from hfprune_dist.config.parameters import KINDS, LIBRARIES, Parameters, UnreadParameters, parameters_of
from hfprune_dist.errors import UserError
from hfprune_dist.store import provenance
from hfprune_dist.store.hashing import digest_of

# Kinds whose artifact is a model with parts of their input model removed.
CUTTING = frozenset(name for name, kind in KINDS.items() if kind.cuts)
Content = Literal["", "text", "tasks", "checkpoint", "commit"]


@dataclass(frozen=True)
class Input:
    """Something that a stage reads. Only ``identity`` is part of the fingerprint.

    For an artifact of another stage, the location is its id, and so is the identity if all of the artifact matters. For
    files of the user's, the identity is a digest of their content, and the location their path.

    Attributes:
        content: what the identity of a user's files is the digest of: a ``text``, a folder of lm-eval ``tasks``
            with the files elsewhere that they read, the files that make up a ``checkpoint``, or the name of a
            ``commit`` on the hub, whose files never change. Empty for artifacts.
    """

    identity: str
    location: str
    is_stage: bool = False
    content: Content = ""


@dataclass(frozen=True)
class Stage:
    """One unit of work with one artifact.

    Attributes:
        kind: one of ``KINDS``.
        label: name for people; not part of the fingerprint.
        params: all settings that affect the result, as the kind's class.
        inputs: role -> input.
        releases: package -> release (major and minor number) of each library that the result depends on.
        planned_as: the fingerprint with which another version of the code planned it; empty for this version's.
    """

    kind: str
    label: str
    params: Parameters
    inputs: Mapping[str, Input] = field(default_factory=dict)
    releases: Mapping[str, str] = field(default_factory=dict)
    planned_as: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """20 hex digits of the sha256 over version, settings, input identities and releases."""
        if self.planned_as:
            return self.planned_as
        identities = {role: source.identity for role, source in self.inputs.items()}
        made_from = {"params": self.params.to_json(), "inputs": identities, "releases": dict(self.releases)}
        return digest_of({"version": KINDS[self.kind].version, "kind": self.kind, **made_from})[:20]

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.fingerprint}"

    @property
    def needs(self) -> list[str]:
        """Ids of the stages whose artifacts this one reads."""
        return [source.location for source in self.inputs.values() if source.is_stage]

    def as_input(self) -> Input:
        return Input(self.id, self.id, is_stage=True)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "label": self.label,
            "params": self.params.to_json(),
            "inputs": {role: asdict(source) for role, source in self.inputs.items()},
            "releases": dict(self.releases),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Stage:
        """Read a record written by ``to_json``, to run the stage; that of another version of the code is refused."""
        stage = cls.recorded(record)
        if stage.planned_as:
            raise UserError(f"{stage.id} was planned by another version of the code; run sweep.py again")
        return stage

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Stage:
        """Read a record written by ``to_json``, by whatever version of the code, to show the stage or end its job."""
        kind, label, planned_as = record["kind"], record["label"], record["fingerprint"]
        inputs = {role: Input(**source) for role, source in record["inputs"].items()}
        with suppress(KeyError, ValidationError):
            stage = cls(kind, label, parameters_of(kind)(**record["params"]), inputs, record["releases"])
            if stage.fingerprint == planned_as:
                return stage
        return cls(
            kind, label, UnreadParameters(settings=record["params"]), inputs, record.get("releases", {}), planned_as
        )


def releases_of(kind: str) -> dict[str, str]:
    """The installed releases that results of a kind of stage depend on: package -> major and minor number."""
    return provenance.releases((*LIBRARIES, *KINDS[kind].libraries))


def kind_of(stage_id: str) -> str:
    """The kind of a stage, from its id."""
    return stage_id.partition("/")[0]
