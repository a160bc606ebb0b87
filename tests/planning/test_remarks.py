"""Remarks about settings that are allowed but do less than they say."""

from pathlib import Path

import pytest

from hfprune_dist.config.load import load_config
from hfprune_dist.planning.idle_settings import CHANGES_NO_RESULT
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.remarks import remarks_on_settings

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "methods"


@pytest.mark.parametrize(
    ("methods", "settings", "idle"),
    [
        (["hfprune"], {"floor": 0.1, "multiple_of": 8}, ["floor: hfprune"]),
        (["surgeon"], {"floor": 0.1}, []),
        (["hfprune", "surgeon-plain"], {"tensor_parallel": 3}, ["tensor_parallel: hfprune"]),
        (
            ["hfprune", "wanda-sp"],
            {"floor": 0.1, "protect_first": 1},
            ["floor: hfprune, wanda-sp", "protect_first: hfprune"],
        ),
        (
            ["sdmprune", "flap"],
            {"tensor_parallel": 2, "student_lacks": 0.1},
            ["tensor_parallel: sdmprune", "student_lacks: flap"],
        ),
    ],
)
def test_a_setting_that_a_method_takes_no_notice_of_is_told(methods, settings, idle):
    config = load_config([], {"methods": methods, **{f"prune.{name}": value for name, value in settings.items()}})
    told = remarks_on_settings(config, resolve_methods(config, SHIPPED))
    assert told == [f"prune.{it.replace(': ', ' changes nothing with ')}" for it in idle]


def remarks(settings):
    """Return what is told of a sweep with these settings."""
    config = load_config([], settings)
    return remarks_on_settings(config, resolve_methods(config, SHIPPED))


PAIRS = "pairs are read from recovery.instruction_field and recovery.response_field"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"recovery.text_field": "output"}, [f"recovery.text_field {CHANGES_NO_RESULT}: {PAIRS}"]),
        ({"recovery.text_field": "response", "recovery.response_field": "output"}, []),
        ({"recovery.method": "none", "recovery.text_field": "output"}, []),
        ({"recovery.split": "test", "calibration.revision": "abc", "evaluation.fidelity.name": "de"}, []),
        (
            {"recovery.max_steps": 8, "recovery.epochs": 1.0},
            [f"recovery.epochs {CHANGES_NO_RESULT}: recovery.max_steps overrides it"],
        ),
        ({"recovery.max_steps": 8, "recovery.epochs": 2.0}, []),  # a sweep's folder states all defaults
        ({"recovery.method": "none", "runtime.report_to": ["wandb"]}, ["runtime.report_to changes nothing: no stage"]),
        ({"recovery.method": "none", "runtime.report_to": ["wandb"], "prune.distill": 1}, []),
        ({"runtime.tracking_project": "mine"}, ["runtime.tracking_project changes nothing: runtime.report_to names"]),
        (
            {"runtime.tracking_project": "mine", "runtime.report_to": ["tensorboard"]},
            ["names neither trackio nor wandb"],
        ),
        ({"runtime.tracking_project": "mine", "runtime.report_to": ["trackio"]}, []),
        ({"methods": ["loraprune"], "calibration.samples": 8}, ["calibration changes nothing with loraprune, which"]),
        ({"methods": ["loraprune", "hfprune"], "calibration.samples": 8}, []),
        ({"methods": ["loraprune"], "calibration.samples": 8, "importance.criteria": ["magnitude"]}, []),
        ({"methods": ["loraprune"], "recovery.text_field": "output"}, [PAIRS]),
        (
            {"aliases.own": {"path": "/own", "revision": "abc"}},
            ["aliases.own.revision changes nothing beside its path"],
        ),
        ({"aliases.own": {"hub_id": "org/own", "revision": "abc"}}, []),
    ],
)
def test_a_setting_that_nothing_reads_is_told(settings, told):
    found = remarks(settings)
    assert len(found) == len(told) and all(part in it for part, it in zip(told, found, strict=True))


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("calibration", {"name": "de", "split": "test"}),
        ("recovery", {"revision": "abc"}),
        ("evaluation.fidelity", {"split": "test"}),
        ("evaluation.fidelity.texts.own", {"split": "test"}),
        ("calibration.mixture.0", {"revision": "abc"}),
    ],
)
def test_what_only_data_sets_have_is_told_beside_a_file(tmp_path, key, given):
    section, _, of_several = key.partition(".mixture.")
    text = {"path": str(tmp_path / "a.jsonl"), **given}
    settings = {f"{section}.mixture": [text, {"path": str(tmp_path / "b.jsonl")}]} if of_several else {key: text}
    told = [f"{key}.{name} changes nothing beside {key}.path: only data sets have one" for name in given]
    assert remarks(settings) == told


@pytest.mark.parametrize(("name", "is_plain"), [("a.txt", True), ("a.md.gz", True), ("a.jsonl", False), (".", False)])
def test_plain_text_has_no_fields(tmp_path, name, is_plain):
    for file in ("a.txt", "a.md.gz", "a.jsonl"):
        (tmp_path / file).write_text("")
    path = str(tmp_path / name)
    told = [f"calibration.text_field {CHANGES_NO_RESULT}: {path} is plain text, without fields"] if is_plain else []
    assert remarks({"calibration": {"path": path, "text_field": "content"}}) == told


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"calibration.path": "/a.jsonl", "evaluation.fidelity.path": "/x/../a.jsonl"}, [("", "")]),
        ({"calibration.path": "/a.jsonl", "evaluation.fidelity.path": "/b.jsonl"}, []),
        ({"calibration.path": "/texts", "evaluation.fidelity.path": "/texts/a.jsonl"}, [("", "")]),
        ({"calibration.path": "/texts/a.jsonl", "evaluation.fidelity.path": "/texts"}, [("", "")]),
        ({"calibration.path": "/texts", "evaluation.fidelity.path": "/texts/more/a.jsonl"}, []),
        ({"evaluation.fidelity.split": "train"}, [("", "")]),
        ({"evaluation.fidelity.split": "train", "calibration.name": "de"}, []),
        ({"calibration.path": "/a.jsonl", "evaluation.fidelity.split": "train"}, []),
        (
            {
                "calibration.mixture": [{"path": "/a.jsonl"}, {"path": "/b.jsonl"}],
                "evaluation.fidelity.texts": {"own": {"path": "/b.jsonl"}, "news": {"path": "/c.jsonl"}},
            },
            [(".texts.own", ".mixture.1")],
        ),
        ({"methods": ["loraprune"], "evaluation.fidelity.split": "train"}, []),
    ],
)
def test_a_comparison_on_text_that_models_are_pruned_on_is_told(settings, same):
    told = [f"evaluation.fidelity{one} and calibration{other} read the same text" for one, other in same]
    assert [it.partition(":")[0] for it in remarks(settings)] == told


def test_a_setting_of_a_methods_own_file_that_it_takes_no_notice_of_is_told(tmp_path):
    (tmp_path / "mine.yaml").write_text("{criterion: entropy, floor: 0.1, multiple_of: 8}")
    assert remarks({"methods": [str(tmp_path / "mine.yaml")]}) == ["floor in the method mine changes nothing"]
    shipped = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    assert not remarks({"methods": shipped})


@pytest.mark.parametrize("name", ["demo", "sweeps/fidelity", "sweeps/own-model", "sweeps/paper", "sweeps/rivals"])
def test_nothing_is_to_be_told_of_shipped_sweeps(name):
    config = load_config([SHIPPED.parent / f"{name}.yaml"], {})
    assert not remarks_on_settings(config, resolve_methods(config, SHIPPED))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_steps": 4, "warmup_steps": 4}, ["max_steps is 4 and warmup_steps 4", "comes to 75% of learning_rate"]),
        ({"max_steps": 1, "warmup_steps": 2}, ["max_steps is 1 and warmup_steps 2", "comes to 0% of learning_rate"]),
        ({"max_steps": 4, "warmup_steps": 3}, []),
        ({"max_steps": 4, "warmup_steps": 4, "method": "none"}, []),
        ({"warmup_steps": 10**6}, []),
    ],
)
def test_a_recovery_that_is_all_warm_up_is_told(settings, told):
    found = remarks({f"recovery.{name}": value for name, value in settings.items()})
    assert len(found) == bool(told) and all(part in " ".join(found) for part in told)


@pytest.mark.parametrize("method", ["surgeon-distilled", "surgeon-plain"])
@pytest.mark.parametrize(("batch_size", "at_once"), [(4, 4), (4, 5), (1, "auto"), (16, 64)])
def test_rows_of_distillation_beyond_a_step_are_told(method, batch_size, at_once):
    sizes = {"distillation.batch_size": batch_size, "distillation.micro_batch_size": at_once}
    told = remarks({"methods": [method], **sizes})
    is_told = method == "surgeon-distilled" and at_once != "auto" and at_once > batch_size
    assert any(it.startswith(f"distillation.micro_batch_size is {at_once} and") for it in told) == is_told


@pytest.mark.parametrize(
    ("methods", "settings", "told"),
    [
        (["llm-pruner"], {"prune.steps": 2}, ["llm-pruner"]),
        (["llm-pruner", "flap", "hfprune"], {"prune.round_ratio": 0.1}, ["llm-pruner", "flap"]),
        (["llm-pruner"], {"prune.round_ratio": 0.3}, []),  # a single round
        (["llm-pruner"], {"prune.steps": 2, "calibration.settled": None}, []),
        (["llm-pruner", "hfprune"], {}, []),
        (["hfprune", "surgeon-plain", "loraprune"], {}, []),
    ],
)
def test_rounds_that_use_all_samples_whatever_has_settled_are_told(methods, settings, told):
    asked = {"methods": methods, "calibration.settled": 0.9, "importance.criteria": ["entropy"], **settings}
    assert [it.split(" ")[8].strip(",") for it in remarks(asked) if it.startswith("calibration.settled")] == told
