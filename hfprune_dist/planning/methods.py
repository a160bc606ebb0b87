"""Pruning methods by the names that a user gives; which of their settings go together, and which models take them.

A rule holds for methods with certain settings, or for models of some kind, and says which values other settings may
have there. The first one that is broken makes the message; settings without effect break none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.engines import ENGINES
from hfprune_dist.config.load import parse
from hfprune_dist.config.method import Allocation, Method, Refit
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.config.yaml_text import read_yaml
from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.methods import CRITERIA, SCORED_WHILE_PRUNED
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, KV_GROUPS, LAYERS, NEURONS

# Name of a setting -> values of it.
Values = Mapping[str, Sequence[object]]

ALONE, GROUPS, EXPERTS_ALONE = [NEURONS], [NEURONS, KV_GROUPS], [EXPERTS]
WITH_LAYERS = [NEURONS, LAYERS], [NEURONS, KV_GROUPS, LAYERS]
OF_NEURONS = ALONE, GROUPS, *WITH_LAYERS
NO_BIAS = [name for name in get_args(Refit) if name != "bias"]


def scoring(*kinds: str) -> list[str]:
    """Names of the criteria by which units of any of these kinds have scores."""
    return [name for name, criterion in CRITERIA.items() if criterion.units & {*kinds}]


@dataclass(frozen=True)
class Rule:
    """What methods with the settings ``given`` take, and why."""

    given: Values
    takes: Values
    because: str


RULES = (
    Rule({"prunes_in": ["calibration"]}, {"criterion": [*CRITERIA, *SCORED_WHILE_PRUNED]}, "it scores units"),
    Rule(
        {"prunes_in": ["recovery"]},
        {"criterion": [None], "allocation": ["local"], "refit": ["none"]},
        "LoRA's own gradients score units while it recovers the model",
    ),
    Rule(
        {"structures": [EXPERTS_ALONE]},
        {
            "prunes_in": ["calibration"],
            "allocation": ["uniform"],
            "refit": ["none"],
            "criterion": scoring(EXPERTS),
        },
        "experts go as a whole, the same number in every layer, and the others stay as they are",
    ),
    Rule(
        {"structures": OF_NEURONS},
        {"criterion": [None, *scoring(NEURONS), *SCORED_WHILE_PRUNED]},
        "others have no scores for neurons",
    ),
    Rule(
        {"criterion": [name for name in scoring(NEURONS) if name not in scoring(KV_GROUPS)]},
        {"structures": [ALONE, WITH_LAYERS[0]]},
        "it scores neurons alone, whose weights meet at the hidden channels",
    ),
    Rule({"allocation": ["uniform"]}, {"structures": [ALONE, EXPERTS_ALONE]}, "it is one width, or one number"),
    Rule(
        {"allocation": ["plain"]},
        {"structures": [*WITH_LAYERS, GROUPS], "refit": NO_BIAS},
        "it measures shapes after least squares; of neurons alone the one width is allocation: uniform",
    ),
    Rule({"allocation": ["searched"]}, {"refit": NO_BIAS}, "it measures shapes after least squares"),
    Rule(
        {"allocation": ["local", "global", "standardized"]},
        {"structures": [ALONE, GROUPS]},
        "layers have no scores, and it measures nothing",
    ),
    Rule(
        {"allocation": ["low_rank"]},
        {"criterion": [*SCORED_WHILE_PRUNED], "structures": [ALONE], "refit": ["none"]},
        "it scores while it prunes, and attention's new weights aren't a refit",
    ),
    Rule({"criterion": [*SCORED_WHILE_PRUNED]}, {"allocation": ["low_rank"]}, "it scores while it prunes"),
)


@dataclass(frozen=True)
class ModelRule:
    """What models of a kind take; ``kind`` describes a model of it, for messages, and is false for all others."""

    kind: Callable[[Checkpoint], object]
    takes: Values


MODEL_RULES = (
    ModelRule(
        lambda model: model.family.experts and "is a mixture of experts",
        {
            "prunes_in": ["calibration"],
            "structures": [ALONE, GROUPS, EXPERTS_ALONE],
            "allocation": ["uniform", "local"],
            "protect_first": [0],
            "protect_last": [0],
            "refit": ["none", "dense"],
            "criterion": scoring(EXPERT_NEURONS, EXPERTS),
        },
    ),
    ModelRule(lambda model: not model.family.experts and "has no experts", {"structures": OF_NEURONS}),
    ModelRule(
        lambda model: model.family.has_vision and "is a vision-language model, which must stay plain",
        {"allocation": ["uniform", "plain"], "refit": NO_BIAS},
    ),
    ModelRule(
        lambda model: model.family.whole_groups and f"has KV groups that can't be pruned ({model.family.whole_groups})",
        {"structures": [ALONE, WITH_LAYERS[0], EXPERTS_ALONE]},
    ),
    ModelRule(
        lambda model: model.family.no_low_rank and f"takes no low rank ({model.family.no_low_rank})",
        {"allocation": [name for name in get_args(Allocation) if name != "low_rank"]},
    ),
    ModelRule(
        lambda model: model.family.no_sequence and f"can't be refitted block by block ({model.family.no_sequence})",
        {"refit": ["none", "bias", "dense"]},
    ),
    ModelRule(
        lambda model: (
            not model.is_uniform and "has layers that differ in width or in heads, so it has been pruned already,"
        ),
        {"allocation": ["local", "global", "standardized", "searched"]},
    ),
)


def resolve_methods(config: SweepConfig, shipped: Path) -> dict[str, Method]:
    """Return the sweep's methods by name: those that come with the project, as ``<name>.yaml`` in the folder
    ``shipped``, or YAML files, with the ``prune`` section's keys on top. What isn't a method is refused.
    """
    files = {file.stem: file for file in sorted(shipped.glob("*.yaml"))}
    on_top = config.prune.model_dump(exclude_none=True)
    methods: dict[str, Method] = {}
    for name in config.methods:
        file = files.get(name, Path(name))
        if name not in files and file.suffix not in (".yaml", ".yml"):
            raise UserError(
                f"--methods: unknown method {name!r}{did_you_mean(name, files)}; valid: {', '.join(files)}, "
                "or a YAML file"
            )
        if file.stem in methods:
            raise UserError(f"--methods: two methods are called {file.stem!r}; leave one out, or rename its file")
        settings = read_yaml(file, "--methods", "the keys of a method")
        where = f"{file} with prune.{', prune.'.join(on_top)}" if on_top else str(file)
        methods[file.stem] = parse(Method, {**settings, **on_top}, where)
        refuse_method(methods[file.stem], f"configuration ({where})")
    return methods


def refuse_method(method: Method, where: str) -> None:
    """Refuse settings that don't go together: name one that isn't possible, and what is."""
    for rule in RULES:
        if all(getattr(method, name) in values for name, values in rule.given.items()):
            for told in _broken(rule.takes, method):
                given = ", ".join(f"{name}: {_shown(getattr(method, name))}" for name in rule.given)
                raise UserError(f"{where}: with {given}, {told}; {rule.because}")


def refuse_rounds(methods: Mapping[str, Method], recovery: RecoveryConfig) -> None:
    """Refuse rounds between which nothing is trained, or with a method that can't prune what is left of a model."""
    if not any(recovery.trainings().values()):
        raise UserError("rounds: nothing is trained between them; set recovery.method, or leave rounds out")
    for name, method in methods.items():
        reasons = {
            "it prunes while it trains": method.prunes_in == "recovery",
            "matrices of low rank can't be pruned again": method.allocation == "low_rank",
            "its student lacks a share of the dense model": method.student_chosen_by is not None,
        }
        for why in (reason for reason, holds in reasons.items() if holds):
            raise UserError(f"rounds: method {name!r} can't go by rounds: {why}; leave the method or rounds out")


def refuse_model(method: Method, checkpoint: Checkpoint, where: str) -> None:
    """Refuse a model that doesn't take a method: name the setting, and what is possible."""
    for told in why_not(method, checkpoint):
        raise UserError(f"{where}: {checkpoint.family.model_type} {told}")


def why_not(method: Method, checkpoint: Checkpoint) -> Iterator[str]:
    """What a model is, with which settings of the method aren't possible; nothing if all are."""
    for rule in MODEL_RULES:
        if kind := rule.kind(checkpoint):
            yield from (f"{kind}, with which {told}" for told in _broken(rule.takes, method))


def can_do(method: Method, checkpoint: Checkpoint) -> bool:
    """Whether a method applies to a model; an adaptive one is left out where a mixture of experts rules it out."""
    if not (method.adapts and checkpoint.family.experts):
        return True
    return not any(why_not(suited(method, checkpoint), checkpoint))


def suited(method: Method, checkpoint: Checkpoint) -> Method:
    """A method that ``adapts`` without what the model's architecture rules out; any other method unchanged."""
    if not method.adapts:
        return method
    family, stay = checkpoint.family, why_groups_stay(method, checkpoint)
    structures = [kind for kind in method.structures if kind != KV_GROUPS or not stay]
    refit = "dense" if family.no_sequence and method.refit in ("layerwise", "block") else method.refit
    return method.model_copy(update={"structures": structures, "refit": refit})


def why_groups_stay(method: Method, checkpoint: Checkpoint) -> str:
    """Why a method that ``adapts`` removes no KV groups of a model; empty if it may."""
    own, engines = checkpoint.family.model_type, method.for_engines if method.allocation == "plain" else []
    ignoring = [name for name in engines if own in ENGINES[name].whole_heads.split()]
    they = f"{', '.join(ignoring)} {'ignore' if len(ignoring) > 1 else 'ignores'} head_dim in a {own}"
    return checkpoint.family.whole_groups or (they if ignoring else "")


def refuse_criteria(criteria: Iterable[str], checkpoint: Checkpoint, structures: Iterable[str]) -> None:
    """Refuse further criteria that score nothing that is pruned in a model, or a student: only methods choose one."""
    kinds = {EXPERT_NEURONS if checkpoint.family.experts and name == NEURONS else name for name in structures}
    possible = [name for name in scoring(*(kinds - {KV_GROUPS})) if CRITERIA[name].student_by is None]
    for name in criteria:
        if name not in possible:
            raise UserError(
                f"importance.criteria: {name} scores nothing that is pruned in {checkpoint.path}, or a student that "
                f"only a method chooses; valid: {', '.join(possible)}"
            )


def _broken(takes: Values, method: Method) -> Iterator[str]:
    """What a rule says of each setting that it doesn't allow."""
    for name, values in takes.items():
        value = getattr(method, name)
        if value not in values and name not in method.without_effect:
            yield f"{name}: {_shown(value)} isn't possible; valid: {', '.join(map(_shown, values))}"


def _shown(value: object) -> str:
    """A value as it is written in YAML."""
    return "null" if value is None else str(value).replace("'", "")
