"""Settings that have no effect because of another setting.

Obvious cases (``recovery.epochs`` with ``recovery.method: none``) and sections for methods that the sweep doesn't have
are not reported, since files of settings are shared between sweeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import Section, TextSource
from hfprune_dist.config.texts import FIRST, CalibrationConfig
from hfprune_dist.data.formats import is_plain_text
from hfprune_dist.planning.plan import NONE

# Settings that choose a part of a data set on the hub; a file has no parts.
PARTS_OF_A_DATA_SET = ("name", "split", "revision")
# The trackers that file runs under a project.
WITH_PROJECTS = {"trackio", "wandb"}
# What is said of settings that nothing reads, but that are part of fingerprints.
CHANGES_NO_RESULT = "changes no result, although with another value stages run again"


def idle_settings(config: SweepConfig, methods: Mapping[str, Method]) -> Iterator[str]:
    """A sentence about each setting that changes no result.

    Raises:
        UserError: if a text has no files.
    """
    yield from _of_methods(config, methods)
    if not _calibrates(config, methods) and config.calibration != CalibrationConfig():
        yield f"calibration changes nothing with {', '.join(methods)}, which score while they recover"
    for key, text in texts_read(config, methods).items():
        yield from _of_a_text(key, text)
    yield from _of_training(config, methods)
    for name, alias in config.aliases.items():
        if alias.path is not None and _is_given(alias, "revision"):
            yield f"aliases.{name}.revision changes nothing beside its path: only models on the hub have one"


def _of_methods(config: SweepConfig, methods: Mapping[str, Method]) -> Iterator[str]:
    """Settings of the ``prune`` section, and of methods' own files, that change nothing with some of the methods."""
    given = config.prune.model_dump(exclude_none=True)
    for name in given:
        if those := [it for it, method in methods.items() if name in method.without_effect]:
            yield f"prune.{name} changes nothing with {', '.join(those)}"
    for it, method in methods.items():
        own = [name for name in type(method).model_fields if name in method.model_fields_set - given.keys()]
        for name in (name for name in own if name in method.without_effect):
            yield f"{name} in the method {it} changes nothing"


def texts_read(config: SweepConfig, methods: Mapping[str, Method]) -> dict[str, TextSource]:
    """The texts that the sweep reads, by the keys of their settings."""
    texts: dict[str, TextSource] = {}
    if _calibrates(config, methods):
        for number, text in enumerate(config.calibration.mixture or []):
            texts[f"calibration.mixture.{number}"] = text
        if not texts:
            texts["calibration"] = config.calibration
    if _trains_on_pairs(config, methods):
        texts["recovery"] = config.recovery
    several = config.evaluation.fidelity.texts or {FIRST: config.evaluation.fidelity}
    return texts | {
        f"evaluation.fidelity.texts.{it}" if it else "evaluation.fidelity": text for it, text in several.items()
    }


def _of_a_text(key: str, text: TextSource) -> Iterator[str]:
    if text.path is not None:
        for name in (name for name in PARTS_OF_A_DATA_SET if _is_given(text, name)):
            yield f"{key}.{name} changes nothing beside {key}.path: only data sets have one"
    if not _is_given(text, "text_field"):
        return
    if key == "recovery":
        fields = f"{key}.instruction_field and {key}.response_field"
        yield f"{key}.text_field {CHANGES_NO_RESULT}: pairs are read from {fields}"
    elif text.path is not None and is_plain_text(Path(text.path)):
        yield f"{key}.text_field {CHANGES_NO_RESULT}: {text.path} is plain text, without fields"


def _of_training(config: SweepConfig, methods: Mapping[str, Method]) -> Iterator[str]:
    recovery, runtime = config.recovery, config.runtime
    recovers = _trains_on_pairs(config, methods)
    if recovers and recovery.max_steps is not None and _is_given(recovery, "epochs"):
        yield f"recovery.epochs {CHANGES_NO_RESULT}: recovery.max_steps overrides it"
    if runtime.report_to and not recovers and not any(method.distill for method in methods.values()):
        yield "runtime.report_to changes nothing: no stage of the sweep trains"
    elif _is_given(runtime, "tracking_project") and not WITH_PROJECTS & set(runtime.report_to):
        named = " nor ".join(sorted(WITH_PROJECTS))
        yield f"runtime.tracking_project changes nothing: runtime.report_to names neither {named}"


def _calibrates(config: SweepConfig, methods: Mapping[str, Method]) -> bool:
    return bool(config.importance.criteria) or any(method.prunes_in == "calibration" for method in methods.values())


def _trains_on_pairs(config: SweepConfig, methods: Mapping[str, Method]) -> bool:
    return config.recovery.method != NONE or any(method.prunes_in == "recovery" for method in methods.values())


def _is_given(section: Section, name: str) -> bool:
    """Whether a setting has another value than its default; the files of a sweep's folder state defaults too."""
    return bool(getattr(section, name) != type(section).model_fields[name].default)
