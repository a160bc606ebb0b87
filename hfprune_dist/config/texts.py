"""The texts that models are calibrated on, and those on which they are compared with the dense model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from hfprune_dist.config.left_out import LeftOutAt
from hfprune_dist.config.section import Positive, TextSource

# Stands for the name of the text whose numbers tables show first.
FIRST = ""
# What rows, and manifests of evaluations, call the comparisons on the others.
OTHER_TEXTS = "other_texts"
_REFERENCE = "reference"


class MixedText(TextSource):
    """One text of a mixture."""

    weight: Annotated[float, Field(gt=0, lt=2**31)] = 1.0
    """Its share of the windows is its weight divided by the sum of all weights."""


@dataclass(frozen=True)
class Share:
    """A text and how many of the calibration windows are cut from it.

    Attributes:
        role: of the text among a stage's inputs, where it is a file.
    """

    role: str
    text: TextSource
    windows: int


class CalibrationConfig(TextSource):
    """The text over which importance is accumulated."""

    dataset: str | None = "allenai/c4"
    name: str | None = "en"
    samples: Positive = 1024
    """Number of calibration windows."""
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens per window, the beginning-of-sequence token included."""
    micro_batch_size: Positive = 1
    """Windows per forward pass of one rank."""
    shard_size: Positive = 4
    """Micro-batches of a shard. Sums are reduced over ranks and saved shard by shard; a resume goes on at a shard."""
    settled: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop before all samples are used, as soon as two halves of the windows so far agree on this share of the neurons
    to keep, by every criterion of the pass (checked after 2, 4, 8, ... shards); null uses all samples. The agreement is
    reported in any case. For activation and surgeon it is that of the sums from which their scores are computed.
    magnitude and random have no sums, and entropy_bfloat16 rounds its own: they don't take part in the decision."""
    add_bos_token: Annotated[bool | None, LeftOutAt(None)] = None
    """Begin every window with the tokenizer's BOS token; null: as evaluation.add_bos_token says. A model that was
    pruned on windows with BOS is further from the dense one on text without it."""
    mixture: Annotated[list[MixedText] | None, LeftOutAt(None)] = None
    """Several texts in place of one: a list in which each has the keys of a text (path, or dataset, name, ...) and a
    ``weight``, e.g. [{path: code.jsonl, weight: 1}, {dataset: allenai/c4, name: en, weight: 3}]. They are
    interleaved: each part of the windows, those that refits keep apart among them, has the texts in about these
    shares. What is pruned on text of one kind stays close to the dense model on that kind, much less so on others."""

    @model_validator(mode="after")
    def _is_a_mixture_or_one_text(self) -> CalibrationConfig:
        if self.mixture is None:
            return self
        _refuse_beside(self, CalibrationConfig, "mixture")
        if len(self.mixture) < 2:
            raise ValueError("mixture needs two texts or more; a single one is calibration's own path or dataset")
        _refuse_repeated(self.mixture)
        for number, (text, share) in enumerate(zip(self.mixture, self.shares(), strict=True)):
            if not share.windows:
                raise ValueError(
                    f"mixture.{number}: weight {text.weight:g} comes to none of {self.samples} windows; use more "
                    "samples or a larger weight"
                )
        return self

    def shares(self) -> list[Share]:
        """The texts, and how many windows each gives; together ``samples``."""
        if self.mixture is None:
            return [Share("calibration", self, self.samples)]
        counts = apportioned(self.samples, [text.weight for text in self.mixture])
        return [
            Share(f"calibration {number}", text, count)
            for number, (text, count) in enumerate(zip(self.mixture, counts, strict=True), start=1)
        ]


def apportioned(total: int, weights: list[float]) -> list[int]:
    """Whole numbers in proportion to the weights that sum to ``total``, by largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(it) for it in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


class HeldOutText(TextSource):
    """Text that no other stage reads."""

    split: str = "validation"


def _text_name(name: str) -> str:
    # It is part of a file's name, of columns and of labels.
    if re.fullmatch(r"\w[\w.-]{0,39}", name, re.ASCII) is None:
        raise ValueError(f"{name!r}: name a text with up to 40 letters, digits, _, - and ., the first no - or .")
    return name


class FidelityConfig(HeldOutText):
    """Held-out text on which a model is compared with its dense original, token by token."""

    dataset: str | None = "allenai/c4"
    name: str | None = "en"
    windows: Positive = 64
    """Number of held-out windows, of each text."""
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens per window, the beginning-of-sequence token included."""
    texts: Annotated[dict[Annotated[str, AfterValidator(_text_name)], HeldOutText] | None, LeftOutAt(None)] = None
    """Several texts in place of one, by names of your choice, each with the keys of a text (path, or dataset, ...),
    e.g. {own: {path: own.jsonl}, news: {path: news.jsonl}}. Perplexity, KL and agreement in tables are those on the
    first; --wide shows KL on the second too or, where there are more, the worst. results.csv has all."""

    @model_validator(mode="after")
    def _is_one_text_or_several(self) -> FidelityConfig:
        if self.texts is None:
            return self
        _refuse_beside(self, FidelityConfig, "texts")
        if not self.texts:
            raise ValueError("texts has none; name one, or set texts to null")
        _refuse_repeated(list(self.texts.values()))
        return self

    def each(self) -> dict[str, FidelityConfig]:
        """Every text by its name, with settings as if it were the only one; a single one has no name."""
        if self.texts is None:
            return {FIRST: self}
        sizes: dict[str, Any] = {"windows": self.windows, "sequence_length": self.sequence_length}
        return {name: FidelityConfig(**sizes, **text.model_dump()) for name, text in self.texts.items()}


def reference_role(name: str) -> str:
    """Role, among an evaluation's inputs, of the dense model's reference on a text."""
    return f"{_REFERENCE} {name}".rstrip()


def compared_texts(roles: Iterable[str]) -> dict[str, str]:
    """Name of each text that an evaluation compares on -> role of its reference, the first text first."""
    names = {role.removeprefix(_REFERENCE).strip(): role for role in roles if role.split(" ")[0] == _REFERENCE}
    return {name: names[name] for name in sorted(names)}


def _refuse_beside(section: TextSource, schema: type[TextSource], several: str) -> None:
    """Refuse settings of a single text beside several that have their own."""
    fields = schema.model_fields
    own = [name for name in TextSource.model_fields if getattr(section, name) != fields[name].default]
    if own:
        default = fields[own[0]].default
        raise ValueError(
            f"{own[0]} ({getattr(section, own[0])}) and {several} are both given; set {own[0]} to "
            f"{'null' if default is None else default}, or {several} to null"
        )


def _refuse_repeated(texts: list[MixedText] | list[HeldOutText]) -> None:
    seen: list[dict[str, object]] = []
    for text in texts:
        place = text.model_dump(exclude={"weight"})
        if place in seen:
            raise ValueError(f"{text.path or text.dataset} is listed twice; name it once")
        seen.append(place)
