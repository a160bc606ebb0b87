"""The texts on which models are calibrated, and those on which they are compared with the dense model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from hfprune_dist.config.section import Length, Name, Positive, PositiveOrAuto, TextSource

# Stands for the name of the text whose numbers come first in tables.
FIRST = ""
# Key of the comparisons on the other texts, in rows and in manifests of evaluations.
OTHER_TEXTS = "other_texts"
_REFERENCE = "reference"


class MixedText(TextSource):
    """One text of a mixture."""

    weight: Annotated[float, Field(gt=0, lt=2**31)] = 1.0
    """The text's share of the windows is its weight divided by the sum of all weights."""


class TextShare(NamedTuple):
    """A text, its role among the inputs of a stage if it is a file, and the number of windows that are cut from it."""

    role: str
    text: TextSource
    windows: int


class CalibrationConfig(TextSource):
    """The text on which units are scored."""

    dataset: Name | None = "allenai/c4"
    name: str | None = "en"
    samples: Positive = 1024
    """Number of calibration windows, each at random from a document of its own that is long enough. A plain-text file
    is one document."""
    sequence_length: Length = 1024
    """Tokens per window, the beginning-of-sequence token included."""
    micro_batch_size: PositiveOrAuto = "auto"
    """Windows per forward pass of one rank, in calibration and refits. auto: on a CPU 1; on GPUs as many as keep them
    busy and fit the memory that is free when a stage begins. The manifest has the number. Another one changes results
    by rounding; a number given here also changes which windows refits hold out: whole micro-batches."""
    shard_size: Positive = 4
    """Micro-batches per shard. Sums are reduced over ranks and saved after each shard, from which a run can resume."""
    add_bos_token: bool | None = None
    """Begin windows with the BOS token that the tokenizer puts before a text; null: as in evaluation.add_bos_token."""
    mixture: Annotated[list[MixedText], Field(min_length=2)] | None = None
    """Several texts instead of one: a list of texts, each with the usual keys (path, or dataset, name, ...) and a
    ``weight``, e.g. [{path: code.jsonl, weight: 1}, {dataset: allenai/c4, name: en, weight: 3}]. They are interleaved,
    so that any part of the windows, such as those that refits hold out, has about these shares of the texts. A model
    pruned on one kind of text stays close to the dense model on that kind, but much less so on others."""

    @model_validator(mode="after")
    def _is_a_mixture_or_one_text(self) -> CalibrationConfig:
        if self.mixture is None:
            return self
        _refuse_beside(self, CalibrationConfig, "mixture")
        for number, (text, share) in enumerate(zip(self.mixture, self.shares(), strict=True)):
            if not share.windows:
                raise ValueError(
                    f"mixture.{number}: weight {text.weight:g} comes to none of {self.samples} windows; use more "
                    "samples or a larger weight"
                )
        return self

    @property
    def least_at_once(self) -> int:
        """Windows that pass a model together at least, and that refits hold out together."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    def shares(self) -> list[TextShare]:
        """The texts, with the number of windows cut from each; the numbers sum to ``samples``."""
        if self.mixture is None:
            return [TextShare("calibration", self, self.samples)]
        counts = apportioned(self.samples, [text.weight for text in self.mixture])
        return [
            TextShare(f"calibration {number}", text, count)
            for number, (text, count) in enumerate(zip(self.mixture, counts, strict=True), start=1)
        ]


def apportioned(total: int, weights: list[float]) -> list[int]:
    """Whole numbers that sum to ``total``, in proportion to the weights (largest-remainder method)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


class HeldOutText(TextSource):
    """Text to which nothing is fitted."""

    split: str = "validation"


# It becomes part of file names, columns and labels.
TextName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}$")]


class FidelityConfig(HeldOutText):
    """Held-out text on which a model is compared with its dense original, token by token."""

    dataset: Name | None = "allenai/c4"
    name: str | None = "en"
    windows: Positive = 64
    """Number of held-out windows from each text, cut as those of calibration: standard errors are between documents."""
    sequence_length: Length = 1024
    """Tokens per window, the beginning-of-sequence token included."""
    texts: Annotated[dict[TextName, HeldOutText], Field(min_length=1)] | None = None
    """Several texts instead of one, under names of your choice, each with the keys of a text (path, or dataset, ...),
    e.g. {own: {path: own.jsonl}, news: {path: news.jsonl}}. Tables show perplexity, KL and agreement on the first text;
    results.md also shows KL on each of the others. results.csv has all."""

    @model_validator(mode="after")
    def _is_one_text_or_several(self) -> FidelityConfig:
        if self.texts is not None:
            _refuse_beside(self, FidelityConfig, "texts")
        return self

    def each(self) -> dict[str, FidelityConfig]:
        """Settings for each text as if it were the only one, by name; a single text has no name."""
        if self.texts is None:
            return {FIRST: self}
        sizes: dict[str, Any] = {"windows": self.windows, "sequence_length": self.sequence_length}
        return {name: FidelityConfig(**sizes, **text.model_dump()) for name, text in self.texts.items()}


def reference_role(name: str) -> str:
    """Role of the dense model's reference on a text, among the inputs of an evaluation."""
    return f"{_REFERENCE} {name}".rstrip()


def compared_texts(roles: Iterable[str]) -> dict[str, str]:
    """Name of each text on which an evaluation compares -> role of its reference, the first text first."""
    names = {role.removeprefix(_REFERENCE).strip(): role for role in roles if role.split(" ")[0] == _REFERENCE}
    return {name: names[name] for name in sorted(names)}


def _refuse_beside(section: TextSource, schema: type[TextSource], several: str) -> None:
    """Refuse settings of a single text where there are several texts with their own."""
    for name in TextSource.model_fields:
        if getattr(section, name) != schema.model_fields[name].default:
            raise ValueError(f"{name} ({getattr(section, name)}) and {several} are both given; set {several} to null")
