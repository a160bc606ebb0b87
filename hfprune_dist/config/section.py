"""Types shared by the sections of a configuration: strict sections, counts, sources of text."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping
from datetime import date
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["float32", "bfloat16"]
# Counts. The limit is beyond any sensible value: a mistyped one would make a stage fail, or never end.
Positive = Annotated[int, Field(ge=1, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
# A name or a path; an empty path would mean the current folder.
Name = Annotated[str, Field(min_length=1)]
# A file or folder. A relative path is seen from the folder of the YAML file that names it, or from the current folder
# when it comes from the command line.
LocalPath = Name | None
# What ends a line or controls a terminal, and what isn't UTF-8: Unicode's categories Cc, Zl, Zp and Cs.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Keys of a text that belong to its data set on the hub.
DATA_SET_KEYS = ("name", "split", "revision")
# Tokens of a window, or of a row to train on.
Length = Annotated[int, Field(ge=8, lt=2**31)]


def as_written(value: object) -> str:
    """A value for messages, as YAML has it where that differs from Python."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, date) else repr(value)


# A count, or ``auto``: chosen during planning, or by the memory of GPUs when a stage runs.
PositiveOrAuto = Positive | Literal["auto"]
# A number of things, or a share of all of them.
NumberOrShare = NonNegative | Annotated[float, Field(gt=0, lt=1)]


def without_null(annotation: Any) -> Any:
    """A type as it is if the value isn't null, without what it is annotated with."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def explained_by(*others: type[BaseModel]) -> Callable[[dict[str, Any], type[BaseModel]], None]:
    """Return what completes a JSON schema: keys without explanations get those of the same keys in bases or others."""

    def explain(schema: dict[str, Any], section: type[BaseModel]) -> None:
        known = [model.model_fields for model in (*section.__mro__, *others) if issubclass(model, BaseModel)]
        for name, key in schema["properties"].items():
            told = (fields[name].description for fields in known if name in fields)
            found = next(filter(None, told), None)
            if found is not None:
                key.setdefault("description", found)

    return explain


class Section(BaseModel):
    """A group of keys: immutable, without type conversions; unknown keys are refused."""

    ADDED: ClassVar[Mapping[str, Any]] = {}
    """Keys that were added later -> the value with which all is as before: it is not recorded; fingerprints stay."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=explained_by(),
    )


class TextSource(Section):
    """Source of a text: a local file (``path``) if given, otherwise a data set on the Hugging Face hub."""

    path: LocalPath = None
    """A file of text: .jsonl or .ndjson (one JSON object per line), .json (an array of objects), .csv or .tsv (the
    first line names the fields), .parquet, or any other UTF-8 file as plain text (one document). All but .parquet may
    be compressed (.gz, .bz2, .xz, .zst). A folder stands for all of its files with one of these extensions or .txt, in
    the order of their names."""
    dataset: Name | None = None
    """Hub id of a data set; it is streamed, so only the documents that are used are downloaded."""
    name: str | None = None
    """Configuration name of the data set."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Commit of the data set; pin it to make results reproducible."""
    text_field: str = "text"
    """Field that holds the text, in a file of records or in a data set."""

    @model_validator(mode="before")
    @classmethod
    def _has_one_source(cls, given: Any) -> Any:
        """A file takes the place of the default data set; the default configuration is of that data set alone."""
        if isinstance(given, dict) and given.get("path") is not None:
            return {"dataset": None, "name": None, **given}
        if isinstance(given, dict) and given.get("dataset") not in (None, cls.model_fields["dataset"].default):
            return {"name": None, **given}
        return given

    @model_validator(mode="after")
    def _has_a_source(self) -> TextSource:
        if self.path is None and self.dataset is None:
            raise ValueError("needs a path (a file of text) or a dataset (a hub id)")
        if self.path is not None and self.dataset is not None:
            raise ValueError(f"path ({self.path}) and dataset ({self.dataset}) are both given; leave one of them out")
        return self
