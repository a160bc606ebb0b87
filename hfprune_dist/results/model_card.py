"""The model card of a checkpoint: a README.md in the Hugging Face hub's format, without paths of this machine.

The format: https://huggingface.co/docs/hub/model-cards; the metadata is written by huggingface_hub itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hfprune_dist.checkpoints.licences import is_licence
from hfprune_dist.planning.plan import OWN
from hfprune_dist.results.card_scores import TASK_TYPE, eval_results, scores_of, scores_table
from hfprune_dist.results.card_subject import Subject, text_of
from hfprune_dist.results.formats import counted, number
from hfprune_dist.results.markdown import code, code_block, escaped, table
from hfprune_dist.results.rows import EXPERT_WIDTHS, weight_bytes_of
from hfprune_dist.store.stage import CUTTING, RECOVERING, Stage
from hfprune_dist.structures.experts import EXPERT_COUNT_KEYS, SHARED_WIDTHS
from hfprune_dist.structures.units import plural_of

TAGS = ("hfprune", "pruned", "model-compression")
_READS_IMAGES = "image-text-to-text"
NEEDS_CODE = "modeling_pruned.py"  # plain transformers loads it only with trust_remote_code
PROJECT = "hfprune_dist"
# What people call structures, where that differs.
_STRUCTURES = {"kv_groups": "KV groups"}
# Settings of a prune stage that refit norms -> what a card says of them; the first that is set counts.
_NORMS = {"refit_norms": ", then all norms", "refit_final_norm": ", then the final norm"}


def model_card(subject: Subject) -> str:
    """The full text of the card."""
    from huggingface_hub import ModelCardData

    scores = scores_of(subject)
    base = subject.base
    data = ModelCardData(
        model_name=subject.name,
        base_model=base.hub_id,
        library_name="transformers",
        pipeline_tag=_READS_IMAGES if subject.dense.has_vision else TASK_TYPE,
        tags=[*TAGS, *([subject.cell.method] if subject.cell.method else [])],
        datasets=sorted(_datasets(subject)) or None,
        eval_results=eval_results(scores) or None,
        **base.carried,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {escaped(subject.name)}",
        _summary(subject),
        _facts_table(_facts(subject)),
        "## Scores",
        scores_table(scores) if scores else "Not evaluated yet.",
        _how_to_load(subject),
        _how_it_was_made(subject),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(subject: Subject) -> str:
    cell, base = subject.cell, subject.base
    model = f"[{escaped(base.hub_id)}](https://huggingface.co/{base.hub_id})" if base.hub_id else code(base.name)
    if cell.ratio is None:
        return f"{model} with the fine-tuning that its pruned versions get: the control that they are held against."
    after = ", then fine-tuned with LoRA to recover" if subject.trained_on else ""
    after = ", while it was fine-tuned with LoRA to recover" if cell.recovery == OWN else after
    pruned = f"{100 * cell.ratio:.4g}% of its parameters pruned by the method {code(str(cell.method))}"
    return f"{model} with {pruned}{after}."


def _facts(subject: Subject) -> dict[str, str | None]:
    """Heading of each line of the table -> its text; None if it isn't known or there is nothing to say."""
    base, cell = subject.base, subject.cell
    revision = f", commit `{base.revision}`" if base.revision else ""
    dense = subject.dense.parameters
    parameters = dense if cell.ratio is None else subject.shape.get("parameters")
    return {
        "base model": (f"{escaped(base.hub_id)}{revision}" if base.hub_id else f"{code(base.name)}, a local checkpoint")
        + f", {dense:,} parameters",
        "licence of the base model": escaped(base.licence) if base.licence else _licence_files(subject),
        "method": cell.method and f"{code(cell.method)}: {_method(subject)}",
        "ratio asked": f"{cell.ratio:g} of all parameters" if cell.ratio is not None else None,
        "ratio reached": None if cell.ratio is None else _number(subject.shape.get("ratio_reached"), "{:.4f}"),
        "parameters": _number(parameters, "{:,}"),
        "sizes": _sizes(subject.shape),
        "weights": _number(weight_bytes_of(subject.manifest), "{:,} bytes"),
        "calibration": _calibration(subject),
        "recovery": _recovery(subject) or "none",
    }


def _licence_files(subject: Subject) -> str:
    found = [code(name) for name in subject.files if is_licence(name)]
    return f"see {', '.join(found)}" if found else "not known: see the base model before you share this one"


def _facts_table(facts: Mapping[str, str | None]) -> str:
    return table(["", ""], [[name, value] for name, value in facts.items() if value])


def _number(value: float | None, template: str) -> str | None:
    return None if value is None else template.format(value)


def _method(subject: Subject) -> str:
    cuts = [it.params.to_json() for it in subject.stages if it.kind in CUTTING]
    settings = cuts[-1]
    what = _listed([_STRUCTURES.get(it, it) for it in settings.get("structures", ["neurons"])])
    if subject.cell.recovery == OWN:
        return f"{what} go, scored by LoRA's own gradients while it recovers the model"
    in_parts = f" anew in each of {len(cuts)} parts" if len(cuts) > 1 else ""
    copies = settings.get("refit_copies", 0)
    iterations = settings.get("refit_iterations")
    steps = (
        f" ({counted(iterations, 'iteration')} in its last step)"
        if iterations and settings.get("refit") == "block"
        else ""
    )
    text = f" on the windows and {copies} redrawn {'copies' if copies > 1 else 'copy'} of each" if copies else ""
    norms = next((it for key, it in _NORMS.items() if settings.get(key)), "")
    distilled = ", distillation" if any(it.kind == "distill" for it in subject.stages) else ""
    return (
        f"{what} go, scored by {settings.get('criterion')}{in_parts}; allocation {settings.get('allocation')}, refit "
        f"{settings.get('refit')}{steps}{text}{norms}{distilled}"
    )


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _sizes(shape: Mapping[str, Any]) -> str | None:
    titles = {
        "num_hidden_layers": "layers",
        "num_attention_heads": "attention heads",
        "num_key_value_heads": "key-value heads",
        **dict.fromkeys(EXPERT_COUNT_KEYS, "experts"),
        **{field: f"`{field}`" for field in ("intermediate_size", *EXPERT_WIDTHS.values(), *SHARED_WIDTHS)},
    }
    told = [f"{title} {size}" for key, title in titles.items() if (size := _size(shape, key))]
    told += [f"rank of `{name}` {rank}" for name, rank in (shape.get("attention_ranks") or {}).items()]
    return ", ".join(dict.fromkeys(told)) or None


def _size(shape: Mapping[str, Any], field: str) -> str | None:
    """A size that all layers share, or the lowest and highest if they differ; None if it isn't known."""
    by_layer = shape.get(plural_of(field))
    if by_layer and min(by_layer) < max(by_layer):
        return f"{min(by_layer)} to {max(by_layer)}"
    return _number(shape.get(field), "{}")


def _calibration(subject: Subject) -> str | None:
    stage = next((it for it in subject.stages if it.kind == "importance"), None)
    if stage is None:
        return None
    settings = stage.params.to_json().get("calibration", {})
    texts = settings.get("mixture") or [settings]
    roles = ["calibration"] if len(texts) == 1 else [f"calibration {number}" for number in range(1, len(texts) + 1)]
    named = _listed([text_of(it, stage.inputs.get(role)) for it, role in zip(texts, roles, strict=True)])
    return f"{counted(settings.get('samples'), 'window')} of {settings.get('sequence_length')} tokens of {named}"


def _recovery(subject: Subject) -> str | None:
    stage = subject.trained_on
    if stage is None:
        return None
    settings = stage.params.to_json().get("recovery", {})
    steps = settings.get("max_steps")
    length = counted(steps, "step") if steps else counted(number(settings.get("epochs"), "g"), "epoch")
    return (
        f"LoRA (r {settings.get('rank')}, alpha {settings.get('alpha')}, learning rate {settings.get('learning_rate')},"
        f" batch size {settings.get('batch_size')}, {length}) on "
        f"{text_of(settings, stage.inputs.get('instructions'))}, merged into the weights"
    )


def _datasets(subject: Subject) -> set[str]:
    """Hub ids of the data sets on which the checkpoint was calibrated and trained."""
    settings = [it.params.to_json() for it in subject.stages if it.kind in ("importance", *RECOVERING)]
    sections = [section for it in settings for section in (it.get("calibration"), it.get("recovery")) if section]
    texts = [text for section in sections for text in section.get("mixture") or [section]]
    return {text["dataset"] for text in texts if text.get("dataset") and not Path(text["dataset"]).is_absolute()}


def _why_code(subject: Subject) -> str:
    """The property of a checkpoint for which transformers has no class."""
    if subject.shape.get("attention_ranks"):
        return "Its attention has matrices of low rank"
    if any(it.params.to_json().get("refit") == "bias" for it in subject.stages if it.kind == "prune"):
        return "Its output projections have biases, and layers may differ in their sizes"
    return "Its layers differ in their sizes"


def _how_to_load(subject: Subject) -> str:
    trust = ", trust_remote_code=True" if NEEDS_CODE in subject.files else ""
    auto = "AutoModelForImageTextToText" if subject.dense.has_vision else "AutoModelForCausalLM"
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{subject.name}"{trust})  # this folder, or its id on the hub',
        f'tokenizer = AutoTokenizer.from_pretrained("{subject.name}")',
    ]
    text = "## How to load it\n\n" + code_block("python", "\n".join(lines))
    if trust:
        text += f"\n\n{_why_code(subject)}, for which transformers has no class: `trust_remote_code` loads the one in "
        text += f"`{NEEDS_CODE}`."
    if subject.trained_on:
        before = "base model" if subject.cell.ratio is None else "pruned model before it"
        before = "base model, from before units were cut" if subject.cell.recovery == OWN else before
        text += "\n\nWhat the fine-tuning added is part of these weights. Where they were made, `adapter/` beside them "
        text += f"holds it as an adapter of the {before}."
    return text


def _how_it_was_made(subject: Subject) -> str:
    """The section with versions, the command and the settings of all stages."""
    cell, base = subject.cell, subject.base
    model = f"{base.hub_id}@{base.revision}" if base.hub_id else base.name
    command = f"python launch/sweep.py --models {shlex.quote(model)}"
    command += "" if cell.ratio is None else f" --ratios {cell.ratio:g} --methods {shlex.quote(str(cell.method))}"
    settings = [_portable(_settings(stage)) for stage in subject.stages]
    return (
        f"## How it was made\n\nWith {_versions(subject.manifest.get('provenance', {}))}:\n\n"
        f"{code_block('bash', command)}\n\n{_whose(cell.method)}and these settings of its stages (files by name and "
        f"sha256):\n\n{code_block('yaml', yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))}"
    )


def _whose(method: str | None) -> str:
    """Tell where a method is found, since its name alone may be that of the author's own file."""
    if method is None:
        return ""
    file = shlex.quote(f"{method}.yaml")
    own = code(f"--methods {file}")
    return f"where {code(method)} is a method of the project's, or else its author's own ({own}), "


def _versions(provenance: Mapping[str, Any]) -> str:
    commit = provenance.get("git_commit")
    version = provenance.get("hfprune_dist")
    code = (f" {version}" if version else "") + (f" at commit `{commit}`" if commit else "")
    changed = " with changes" if provenance.get("dirty_diff_sha256") else ""
    packages = {"Python": provenance.get("python"), **provenance.get("packages", {})}
    used = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return f"{PROJECT}{code}{changed}" + (f" ({used})" if used else "")


def _settings(stage: Stage) -> dict[str, Any]:
    """A stage's settings, and the files that it read other than the model."""
    files = {
        role: f"{Path(source.location).name} {source.identity}"
        for role, source in stage.inputs.items()
        if source.content in ("text", "folder", "files of tasks")
    }
    return {"stage": stage.kind, **stage.params.to_json(), **({"files": files} if files else {})}


def _portable(value: Any) -> Any:
    """Settings with each absolute path reduced to its last part."""
    if isinstance(value, Mapping):
        return {key: _portable(it) for key, it in value.items()}
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else value
    return [_portable(it) for it in value] if isinstance(value, Iterable) else value
