import json
import re
from collections import Counter
from unittest import mock

import huggingface_hub
import pytest
from families import save_model
from huggingface_hub.errors import IncompleteSnapshotError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from sweeps import planned
from tiny import edit_json, save_tiny

from hfprune_dist.config.load import load_config
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.model_sources import resolve_models
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.hashing import FileHashes


def plan_of(config, **overrides):
    return planned(config, **overrides)[1]


def kinds(plan):
    return [stage.kind for stage in plan.stages.values()]


def stages_of(plan, kind):
    return [stage for stage in plan.stages.values() if stage.kind == kind]


def test_work_is_shared_and_every_table_has_its_baselines(config):
    plan = plan_of(config)
    assert Counter(kinds(plan)) == {"importance": 2, "reference": 2, "prune": 4, "recover": 6, "evaluate": 8}
    rows = [(cell.model, cell.ratio, cell.recovery) for cell in plan.cells]
    for model in ("alpha", "beta"):
        assert (model, None, "none") in rows and (model, None, "lora") in rows
        assert (model, 0.1, "lora") in rows and (model, 0.2, "lora") in rows
    assert len(rows) == 8


def test_what_prunes_in_recovery_is_a_stage_and_an_evaluation_and_changes_nothing_beside_it(config):
    """It takes recovery's settings as well; without other methods, only criteria that are asked for need a pass."""
    names, settings = ["surgeon-uniform-block", "loraprune"], {"ratios": [0.1]}
    beside, alone = plan_of(config, methods=names, **settings), plan_of(config, methods=names[1:], **settings)
    without = plan_of(config, methods=names[:1], **settings)
    assert set(without.stages) | set(alone.stages) == set(beside.stages)
    assert Counter(kinds(alone)) == {"reference": 2, "recover": 2, "loraprune": 2, "evaluate": 6}
    (row,) = [cell for cell in alone.cells if cell.model == "alpha" and cell.ratio]
    assert (row.label, row.recovery, row.criterion, len(row.producers)) == ("alpha 0.1 loraprune", "own", None, 1)
    steps = plan_of(config, methods=names[1:], recovery__max_steps=3, **settings)
    assert not set(steps.stages) & {stage.id for kind in ("recover", "loraprune") for stage in stages_of(alone, kind)}
    asked = plan_of(config, methods=names[1:], importance__criteria=["entropy"], **settings)
    passes = {stage.id for stage in stages_of(asked, "importance")}
    assert set(asked.asked) == set(asked.stages) - set(alone.stages) == passes


def test_paths_names_and_runtime_stay_out_of_fingerprints(config, tmp_path):
    moved = tmp_path / "renamed.jsonl"
    moved.write_bytes((config.parent / "calibration.jsonl").read_bytes())
    plan = plan_of(config)
    same = plan_of(config, calibration__path=str(moved), runtime__ranks=7, runtime__report_to=["wandb"])
    assert list(plan.stages) == list(same.stages)


@pytest.mark.parametrize(
    ("change", "untouched"),
    [
        # Evaluation of the dense model stays, and so does its recovery, unless that is what changes.
        ({"seed": 1}, {"reference", "evaluate"}),
        ({"calibration__samples": 5}, {"reference", "recover", "evaluate"}),
        ({"prune__multiple_of": 4}, {"importance", "reference", "recover", "evaluate"}),
        ({"recovery__rank": 5}, {"importance", "reference", "prune", "evaluate"}),
        ({"evaluation__limit": 3}, {"importance", "reference", "prune", "recover"}),
        ({"evaluation__fidelity__windows": 3}, {"importance", "prune", "recover"}),
    ],
)
def test_what_affects_a_result_changes_its_fingerprint_and_no_other(config, change, untouched):
    before, after = plan_of(config), plan_of(config, **change)
    kept = {before.stages[stage_id].kind for stage_id in set(before.stages) & set(after.stages)}
    assert kept == untouched


def test_efficiency_is_of_shapes_and_only_where_it_is_asked_for(config):
    """Trainings keep a shape, so they share its measurement."""
    plain = plan_of(config)
    recipes = {"lora": {}, "full": {"method": "full"}}
    settings = {"recovery__recipes": recipes, "device": "here"}
    before, after = (plan_of(config, efficiency__enabled=on, **settings) for on in (False, True))
    assert "efficiency" not in kinds(plain) and list(before.stages) == [
        key for key, stage in after.stages.items() if stage.kind != "efficiency"
    ]
    measured = {stage.id: stage.inputs["model"] for stage in stages_of(after, "efficiency")}
    assert len(measured) == 2 * (1 + len([0.1, 0.2]))
    for cell in after.cells:
        cuts = [made for made in cell.producers if made.startswith("prune/")]
        assert measured[cell.efficiency].location == cuts[-1] if cuts else not measured[cell.efficiency].is_stage
        assert cell.efficiency in cell.results and cell.efficiency in after.upstream(cell)


def test_checks_are_of_pruned_checkpoints_as_rows_have_them(config):
    before, plan = plan_of(config), plan_of(config, engines=["vllm", "mlx"])
    assert plan.stages == plan_of(config, engines=["mlx", "vllm"]).stages
    assert [key for key, stage in plan.stages.items() if stage.kind != "check"] == list(before.stages)
    assert all(cell.check is None for cell in plan.cells if cell.ratio is None)
    for cell in (cell for cell in plan.cells if cell.ratio):
        check = plan.stages[cell.check]
        assert check.params.engines == ["mlx", "vllm"] and check.inputs["model"].location == cell.producers[-1]
        assert cell.check in cell.results and cell.check in plan.upstream(cell)


def test_a_measurement_is_of_its_device_and_workloads(config):
    def measured(device="here", **settings):
        plan = plan_of(config, efficiency__enabled=True, device=device, **settings)
        return {stage.id for stage in stages_of(plan, "efficiency")}

    once = measured()
    assert once == measured(efficiency__batch_sizes=[8, 1], recovery__rank=5)
    others = [measured("there"), measured(efficiency__new_tokens=9), measured(efficiency__dtype="float32")]
    others.append(measured(efficiency__engine="vllm"))
    assert all(not once & other for other in others)
    with pytest.raises(UserError, match=r"520 together, more than the 512 positions of model 'alpha'"):
        measured(efficiency__prompt_tokens=[8, 500], efficiency__new_tokens=20)
    assert plan_of(config, efficiency__prompt_tokens=[600]), "which nobody measures"


def test_several_texts_add_references_and_inputs_and_leave_what_a_single_text_made(config):
    held, text = {"path": str(config.parent / "heldout.jsonl")}, {"path": str(config.parent / "calibration.jsonl")}
    one = plan_of(config)
    named = plan_of(config, evaluation__fidelity__path=None, evaluation__fidelity__texts={"own": held})
    several = plan_of(config, evaluation__fidelity__path=None, evaluation__fidelity__texts={"own": held, "news": text})
    assert list(named.stages) == list(one.stages), "a name is no setting"
    gone = {one.stages[stage_id].kind for stage_id in set(one.stages) - set(several.stages)}
    assert gone == {"evaluate"} and kinds(several).count("reference") == 4
    roles = {role for stage in stages_of(several, "evaluate") for role in stage.inputs}
    assert roles == {"model", "dense", "tasks", "reference", "reference news"}

    mixed = plan_of(config, calibration__path=None, calibration__mixture=[text, held])
    other = plan_of(config, calibration__path=None, calibration__mixture=[text, held | {"weight": 2}])
    importance, heavier = (stages_of(plan, "importance")[0] for plan in (mixed, other))
    assert {*importance.inputs} == {"model", "calibration 1", "calibration 2"}
    assert importance.id not in one.stages and importance.id != heavier.id


def test_one_pass_scores_all_kinds_and_each_method_depends_on_its_own(config, tmp_path):
    """A method of neurons only is planned as it is without others, and one of groups as it is without the former."""
    both = tmp_path / "both.yaml"
    both.write_text("{criterion: surgeon, structures: [kv_groups, neurons], allocation: global}")
    named = (["hfprune"], [str(both)], ["hfprune", str(both)])
    alone, other, together = (plan_of(config, methods=names, models=["alpha"]) for names in named)
    scored = [stage for stage in together.stages.values() if stage.kind == "importance"]
    assert [stage.params.structures for stage in scored] == [["neurons", "kv_groups"]]
    assert scored[0].params.criteria == ["entropy", "surgeon"]
    asked = plan_of(config, methods=["hfprune"], models=["alpha"], importance__criteria=["activation_l1"])
    for plan, more in ((alone, together), (other, together), (alone, asked)):
        new = {stage_id.split("/")[0] for stage_id in set(plan.stages) - set(more.stages)}
        assert new == {"importance"}, "prune stages and what comes after them are the same"
    cuts = [stage.params.to_json() for stage in together.stages.values() if stage.kind == "prune"]
    assert [cut["structures"] for cut in cuts] == [["neurons"], ["neurons", "kv_groups"]] * 2


def test_all_ratios_share_the_first_pass_and_those_with_like_settings_that_over_the_student(config):
    """What else is scored doesn't move the second pass's fingerprint."""
    student = {"a": Method(criterion="coupled_taylor_distilled")}
    first, *students = stages_of(plan_of(config, models=["alpha"], own=student, ratios=[0.1, 0.2, 0.26]), "importance")
    assert first.params.criteria == ["coupled_taylor"] and len(students) == 2
    assert all(stage.inputs["student"].location == first.id and stage.needs == [first.id] for stage in students)
    own = {**student, "b": Method(criterion="weight_taylor", allocation="local", structures=["neurons", "kv_groups"])}
    beside = stages_of(plan_of(config, models=["alpha"], own=own, ratios=[0.1, 0.2, 0.26]), "importance")
    assert beside[0].id != first.id and [stage.id for stage in beside[1:]] == [stage.id for stage in students]
    with pytest.raises(UserError, match=r"importance.criteria: .* or a student that only a method chooses"):
        plan_of(config, own=student, importance__criteria=["coupled_taylor_distilled"])


def test_an_alias_file_that_is_none_is_named_where_it_is_asked_for(config, tmp_path):
    def resolved(name):
        return resolve_models(load_config([], {"models": [name]}), tmp_path, FileHashes(None), download=False)

    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(UserError, match=r"(?s)mine\.yaml.*needs exactly one of path and hub_id"):
        resolved("mine")
    (tmp_path / "another.yaml").write_text(f"path: {config.parent / 'alpha'}\n")
    assert resolved("another")[0].name == "another"


def test_a_linked_model_is_called_by_its_link_and_read_where_it_leads(config, tmp_path):
    """A link that is changed while the sweep runs changes nothing of it."""
    (tmp_path / "current").symlink_to(config.parent / "alpha")
    plan = plan_of(config, models=[str(tmp_path / "current")])
    assert {cell.model for cell in plan.cells} == {"current"}
    locations = {stage.inputs["model"].location for stage in plan.stages.values() if stage.kind == "importance"}
    assert locations == {str((config.parent / "alpha").resolve())}
    assert plan.stages.keys() == plan_of(config, models=["alpha"]).stages.keys()


def test_what_is_downloaded_is_what_a_pruned_copy_needs_and_weights_once(tmp_path, monkeypatch):
    needed = ["config.json", "model-00001-of-00002.safetensors", "README.md", "additional_chat_templates/rag.jinja"]
    needed += ["tokenization_own.py", "tekken.json", "License.md", "COPYING", "NOTICE"]
    files = [*needed, "consolidated.safetensors", "modeling_own.py", "more.md"]

    def downloaded(_hub_id, **asked):
        chosen = filter_repo_objects(files, **{key: asked[key] for key in ("allow_patterns", "ignore_patterns")})
        raise ValueError(f"downloads {', '.join(chosen)}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    with pytest.raises(UserError, match=f"downloads {re.escape(', '.join(needed))};"):
        resolve_models(load_config([], {"models": ["org/name"]}), tmp_path, FileHashes(None), download=True)


def test_offline_a_model_that_others_have_cached_is_read_without_what_only_tells_of_it(config, tmp_path, monkeypatch):
    incomplete = IncompleteSnapshotError("README.md is missing", str(config.parent / "alpha"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=incomplete))
    (found,) = resolve_models(load_config([], {"models": ["org/name"]}), tmp_path, FileHashes(None), download=True)
    assert found.is_here and found.checkpoint.path == config.parent / "alpha"


def test_a_checkpoint_whose_layers_differ_is_pruned_again_where_layers_compete(config, tmp_path):
    folder = save_tiny(tmp_path / "narrowed")
    state = load_file(folder / "model.safetensors")
    for name, dimension in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        key = f"model.layers.1.mlp.{name}.weight"
        state[key] = state[key].narrow(dimension, 0, 20).contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", layer_sizes={"intermediate_size": [48, 20]})
    for method in ("hfprune", "surgeon-plain"):
        with pytest.raises(
            UserError, match=f"'narrowed', method '{method}': llama has layers that differ in width.*, searched"
        ):
            plan_of(config, models=["alpha", str(folder)], methods=[method])
    settings = {"models": [str(folder)], "ratios": [0.05, 0.15], "recovery__method": "none"}
    own = {name: Method(criterion="surgeon", allocation=name) for name in ("global", "searched")}
    plan = plan_of(config, own=own, **settings)
    assert [len(cell.producers) for cell in plan.cells] == [0, 2, 2, 2, 2]
    with pytest.raises(UserError, match=r"ratio 0.4 can't be reached by .* floor 0.2; the nearest possible is 0.1"):
        plan_of(config, models=[str(folder)], own=own, ratios=[0.4])


def test_a_method_that_scores_while_it_prunes_needs_the_windows_alone(config):
    def prune_of_lorap(methods):
        plan = plan_of(config, models=["alpha"], ratios=[0.2], methods=methods)
        (importance,) = stages_of(plan, "importance")
        (prune,) = (stage for stage in plan.stages.values() if getattr(stage.params, "criterion", "") == "lorap")
        return importance.params.criteria, prune

    (nothing, alone), (scored, beside) = map(prune_of_lorap, (["lorap"], ["lorap", "hfprune"]))
    assert (nothing, scored) == ([], ["entropy"]) and alone.id == beside.id
    assert alone.params.dtype and alone.params.micro_batch_size


def test_a_dense_model_alone_may_learn_from_the_windows_of_a_pass(config):
    settings = {"models": ["alpha"], "recovery__text": "calibration", "recovery__method": "full"}
    alone, beside = (plan_of(config, ratios=ratios, **settings) for ratios in ([], [0.2]))
    (importance,), (trained,) = (stages_of(alone, kind) for kind in ("importance", "recover"))
    assert importance.params.criteria == [] and trained.id in beside.stages


def test_recipes_stand_side_by_side_and_share_what_was_pruned(config):
    """The dense model is the control of what learns from labels; from itself it would learn nothing."""
    recipes = {
        "none": {"method": "none"},
        "lora": {},
        "again": {"text": "calibration", "objective": "distill", "epochs": 3.0},
        "more": {"text": "calibration", "objective": 0.5, "method": "full"},
        "beside": {"objective": "distill", "method": "parts", "parts": ["norms"], "evaluate_every": "30k"},
    }
    plan = plan_of(config, models=["alpha"], ratios=[0.2], recovery__recipes=recipes)
    rows = {(cell.ratio, cell.recovery): cell for cell in plan.cells}
    assert [name for ratio, name in rows if ratio] == list(recipes)
    assert [name for ratio, name in rows if not ratio] == ["none", "lora", "more"]
    assert rows[0.2, "again"].label == "alpha 0.2 surgeon-uniform-block + again"
    trained = {place: plan.stages[cell.producers[-1]] for place, cell in rows.items() if cell.producers}
    inputs = {name: set(stage.inputs) for (ratio, name), stage in trained.items() if ratio}
    assert inputs == {
        "none": {"model", "importance"},
        "lora": {"model", "text"},
        "again": {"model", "windows", "reference"},
        "more": {"model", "windows", "reference"},
        "beside": {"model", "text", "dense", "held-out"},
    }
    cut = trained[0.2, "none"]
    assert {stage.inputs["model"] for (ratio, name), stage in trained.items() if ratio and name != "none"} == {
        cut.as_input()
    }
    *_, importance, reference, last = (plan.stages[stage_id] for stage_id in rows[None, "more"].producers)
    assert reference.needs == [importance.id] and reference.id in rows[0.2, "again"].producers
    assert last.params.recovery.tokens is None and trained[0.2, "beside"].params.recovery.evaluate_every == 30_000


def test_what_was_refitted_learns_from_the_dense_model_and_all_else_from_labels_unless_told(config):
    settings = {"models": ["alpha"], "ratios": [0.2], "methods": ["hfprune", "surgeon-plain"]}
    rows = {
        objective: [cell.recovery for cell in plan_of(config, recovery__objective=objective, **settings).cells]
        for objective in ("auto", "labels", "distill")
    }
    assert rows == {
        "auto": ["none", "lora", "lora", "lora-distill"],
        "labels": ["none", *3 * ["lora"]],
        "distill": ["none", *2 * ["lora-distill"]],
    }
    named = plan_of(config, recovery__objective="auto", recovery__recipes={"usual": {}}, **settings)
    assert {stage.params.recovery.objective for stage in stages_of(named, "recover")} == {"labels"}


def test_a_dense_model_answers_once_for_all_of_its_rows(config):
    """Whatever is trained on its answers; another seed changes what is drawn alone."""
    recipes = {"lora": {}, "full": {"method": "full", "objective": 0.5}, "given": {"answers": "given"}}
    settings = {"recovery__answers": "dense", "recovery__recipes": recipes}
    plan = plan_of(config, models=["alpha"], methods=["hfprune", "surgeon-plain"], **settings)
    (stage,) = stages_of(plan, "answers")
    assert {*stage.inputs} == {"model", "text"} and stage.needs == []
    read = {cell.label: plan.stages[cell.producers[-1]].inputs for cell in plan.cells if cell.recovery != "none"}
    assert len(read) == 15
    for label, inputs in read.items():
        assert ("answers" in inputs, "text" in inputs) == ((False, True) if "given" in label else (True, False))
        assert inputs.get("answers", stage.as_input()) == stage.as_input()
    other = {"methods": ["loraprune"], "ratios": [0.1], "recovery__answers": "dense", "seed": 3}
    (alone,) = stages_of(plan_of(config, models=["alpha"], **other), "answers")
    assert alone.id == stage.id
    drawn = [{"recovery__answer_temperature": 0.7, "seed": seed} for seed in (0, 3)]
    others = [{"recovery__sequence_length": 512}, *drawn]
    plans = [plan_of(config, recovery__answers="dense", **other) for other in others]
    assert len({stage.id for plan in plans for stage in stages_of(plan, "answers")} | {stage.id}) == 7


def test_what_prunes_in_recovery_needs_a_section_that_is_whole_without_its_recipes(config):
    settings = {"recovery__path": None, "recovery__answers": "dense", "recovery__recipes": {"a": {"samples": 9}}}
    assert stages_of(plan_of(config, models=["alpha"], **settings), "answers")
    told = r"\(recovery, for loraprune\):\s+answers dense answers all records of a data set, .*: set samples"
    with pytest.raises(UserError, match=told):
        plan_of(config, models=["alpha"], methods=["loraprune"], ratios=[0.1], **settings)


def test_layers_that_a_model_lacks_are_not_for_training(config):
    told = r"recovery parts: parts: last_3_layers of 2; choose at most last_2_layers \(model 'alpha'\)"
    with pytest.raises(UserError, match=told):
        plan_of(config, models=["alpha"], recovery__method="parts")


@pytest.mark.parametrize(
    ("model_type", "method", "told"),
    [
        ("olmo", "parts", "parts: norms have no weights here; choose among lm_head"),
        ("mixtral", "full", "mixtures of experts are trained by LoRA alone; set method: lora"),
    ],
)
def test_norms_without_weights_are_not_for_training_nor_are_mixtures_but_by_lora(
    config, tmp_path, model_type, method, told
):
    settings = {"methods": ["hfprune"], "recovery__method": method, "recovery__parts": ["norms"]}
    with pytest.raises(UserError, match=told):
        plan_of(config, models=[str(save_model(tmp_path / model_type, model_type))], **settings)


def test_rounds_go_on_from_the_row_at_the_first_ratio_by_each_recipe(config):
    """Without that row, the stages on the way are the same; speed is that of the last cut."""
    again = {"text": "calibration", "objective": "distill"}
    recipes = {"none": {"method": "none"}, "lora": {}, "again": again, "full": {**again, "method": "full"}}
    settings = {"models": ["alpha"], "rounds": [0.1, 0.2], "recovery__recipes": recipes, "efficiency__enabled": True}
    plan = plan_of(config, ratios=[0.1], device="here", **settings)
    alone = plan_of(config, ratios=[], device="here", **settings)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).to_json() == plan.to_json()
    rows = {cell.label.removeprefix("alpha "): cell for cell in plan.cells}
    by_rounds = [cell for cell in plan.cells if cell.rounds]
    assert [cell.recovery for cell in by_rounds] == ["lora via 0.1", "again via 0.1", "full via 0.1"]
    assert [(cell.label, cell.producers) for cell in alone.cells if cell.ratio] == [
        (cell.label, cell.producers) for cell in by_rounds
    ]
    for cell, recipe in zip(by_rounds, ("lora", "again", "full"), strict=True):
        before = rows[f"0.1 surgeon-uniform-block + {recipe}"].producers
        assert cell.producers[: len(before)] == before
        importance, cut, trained = (plan.stages[made] for made in cell.producers[-3:])
        assert importance.inputs["model"] == cut.inputs["model"] == plan.stages[before[-1]].as_input()
        assert {*cut.inputs} == {"model", "importance", "dense"} and cut.params.ratio == 0.2
        assert trained.inputs["model"] == plan.stages[cell.efficiency].inputs["model"] == cut.as_input()
        assert "dense" not in plan.stages[rows["0.1 surgeon-uniform-block"].producers[-1]].inputs
        # Whose own head was trained in the first round.
        assert ["head" in plan.stages[made].inputs for made in (before[-1], trained.id)] == [False, recipe == "full"]


def test_a_dense_model_too_large_for_the_disk_runs_beside_the_one_that_learns_from_it(config, monkeypatch):
    monkeypatch.setattr("hfprune_dist.planning.build_plan.STORED_BYTES", 10)
    plan = plan_of(config, models=["alpha"], recovery__text="calibration", recovery__objective="distill")
    assert {role for stage in stages_of(plan, "recover") for role in stage.inputs} == {"model", "windows", "dense"}


@pytest.mark.parametrize(
    "idle",
    [
        {"recovery__revision": "abc"},
        {"recovery__text_field": "response"},
        {"recovery__tokens": "300k", "recovery__epochs": 7.0},
        {"recovery__max_steps": 5, "recovery__tokens": "300k"},
        {"recovery__rank": 5, "recovery__method": "full"},
        {"recovery__answer_temperature": 0.7},
        {"recovery__answers": "dense", "recovery__method": "none"},
        {"prune__tensor_parallel": 2, "methods": ["hfprune"]},
        {"prune__effort": "quick", "methods": ["hfprune"]},
        {"methods": ["loraprune"], "ratios": [0.1], "calibration__samples": 5},
        {"runtime__report_to": ["wandb"], "recovery__method": "none"},
    ],
)
def test_a_setting_that_changes_nothing_makes_no_stage_run_again(config, idle):
    name = [key for key in idle if key not in ("methods", "recovery__method")][-1]
    without = {key: value for key, value in idle.items() if key != name}
    plans = [plan_of(config, models=["alpha"], **settings) for settings in (without, idle)]
    assert plans[0].stages.keys() == plans[1].stages.keys()
