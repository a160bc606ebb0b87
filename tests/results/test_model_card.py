"""Cards as the hub reads them, for plans made from a real configuration; no stage runs here."""

import json
import math
import re
from dataclasses import replace

import pytest
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt
from sweeps import make_inputs, planned

from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.results.base_model import BaseModel
from hfprune_dist.results.card_scores import eval_results, scores_of
from hfprune_dist.results.card_subject import Subject
from hfprune_dist.results.checkpoint_names import checkpoint_names, with_digits
from hfprune_dist.results.model_card import model_card
from hfprune_dist.results.named_checkpoints import named_checkpoints
from hfprune_dist.results.rows import DenseModel
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input

SCORES = {
    "fidelity": {"perplexity": 12.5, "kl": 0.25, "kl_stderr": 0.03125, "top1_agreement": 0.75, "tokens": 124},
    "tasks": {"tiny_choice": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6, "acc_norm_stderr": None}},
}
SHAPE = {"ratio_reached": 0.1987, "parameters": 80, "intermediate_size": None, "intermediate_sizes": [7, 9]}
DENSE = {"alpha": DenseModel(100, 48), "beta": DenseModel(100, 48)}
PROVENANCE = {
    "hfprune_dist": "0.1.0",
    "git_commit": "0123abc",
    "dirty_diff_sha256": "f",
    "python": "3.12.1",
    "packages": {"torch": "2.9"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def fill(store, plan, but=()):
    for stage in plan.stages.values():
        if stage.kind in but:
            continue
        draft = store.open_draft(stage.id)
        (draft / "adapter").mkdir()
        (draft / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": null, "r": 4}')
        for name in ("config.json", "model.safetensors"):
            (draft / name).write_text("content")
        fidelity = SCORES["fidelity"] | ({"kl": 0.0} if stage.label == "alpha dense" else {})
        metrics = {**SHAPE, **SCORES, "fidelity": fidelity}
        store.commit(stage, draft, {"metrics": metrics, "provenance": PROVENANCE})


def texts(config, out, file="README.md", but=(), **overrides):
    """Map the name of each checkpoint of a sweep to a text in its folder."""
    plan, store = planned(config, **overrides)[1], Store(out / "store")
    fill(store, plan, but)
    return {name: it.texts[file] for name, it in named_checkpoints(plan, store, DENSE).items()}


def test_the_hub_reads_what_was_measured(config, tmp_path):
    cards = texts(config, tmp_path)
    data = ModelCard(cards["alpha-0.2-lora"]).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == (
        "transformers",
        "text-generation",
        "alpha-0.2-lora",
    )
    assert {"hfprune", "surgeon-uniform-block"} <= set(data.tags) and data.base_model is None and data.license is None
    found = {(it.dataset_type, it.metric_type): it.metric_value for it in data.eval_results}
    assert found == {
        ("held-out", "kl"): 0.25,
        ("held-out", "kl_stderr"): 0.03125,
        ("held-out", "top1_agreement"): 0.75,
        ("held-out", "perplexity"): 12.5,
        ("tiny_choice", "acc"): 0.5,
        ("tiny_choice", "acc_stderr"): 0.1,
        ("tiny_choice", "acc_norm"): 0.6,
    }


def test_results_of_several_texts_come_back_as_they_were(config, tmp_path):
    held_out = {
        name: {"path": str(config.parent / f"{file}.jsonl")} for name, file in (("a", "heldout"), ("b", "pairs"))
    }
    held_out["b"]["text_field"] = "response"
    held_out["c"] = {"dataset": "org/data", "revision": "0" * 40}
    plan = planned(config, evaluation__fidelity__path=None, evaluation__fidelity__texts=held_out)[1]
    store = Store(tmp_path / "store")
    fill(store, plan)
    cell = plan.cells[1]
    subject = Subject.of("name", cell, plan, store, DENSE["alpha"])
    others = {OTHER_TEXTS: {name: {"kl": kl, "kl_stderr": 0.5} for name, kl in (("b", 1.5), ("c", None))}}
    others[OTHER_TEXTS]["c"]["perplexity"] = 3.0
    evaluation = subject.manifests[cell.evaluate]
    changed = {**subject.manifests, cell.evaluate: {**evaluation, "metrics": evaluation["metrics"] | others}}
    subject = replace(subject, manifests=changed)
    expected = eval_results(scores_of(subject))
    read = ModelCard(model_card(subject)).data.eval_results
    assert len(read) == 10 and sorted(read, key=repr) == sorted(expected, key=repr)
    assert {(it.dataset_type, it.dataset_config) for it in read if it.metric_type == "kl"} == {
        ("held-out", None),
        ("held-out", "b"),
    }
    (of_dataset,) = [it for it in read if it.dataset_type == "org/data"]
    assert (of_dataset.metric_type, of_dataset.dataset_split, of_dataset.dataset_revision) == (
        "perplexity",
        "validation",
        "0" * 40,
    )
    assert all(isinstance(it, EvalResult) and math.isfinite(it.metric_value) for it in read)
    measured = {**SCORES, OTHER_TEXTS: {"b": {"kl": 0.0}}}
    dense = {it.dataset: it.dense for it in scores_of(replace(subject, dense_scores=measured)) if it.metric == "kl"}
    assert [*dense.values()] == [0.25, 0.0], "of each text the dense model's own"


def test_people_read_how_it_was_made(config, tmp_path):
    cards = texts(config, tmp_path)
    card = cards["alpha-0.2-lora"]
    for shown in (
        "| ratio asked | 0.2 of all parameters |",
        "| ratio reached | 0.1987 |",
        "| sizes | `intermediate_size` 7 to 9 |",
        "8 windows of 32 tokens of the file `calibration.jsonl`",
        "LoRA (r 4, alpha 8, learning rate 0.0004, batch size 2, 4 steps) on the file `pairs.jsonl`",
        "nats (lower is better) | 0.25 ± 0.031 | 0 |",
        "| acc | 0.5 ± 0.1 | 0.5 |",
        'AutoModelForCausalLM.from_pretrained("alpha-0.2-lora")',
        "python launch/sweep.py --models alpha --ratios 0.2 --methods surgeon-uniform-block",
        "With hfprune_dist 0.1.0 at commit `0123abc` with changes (Python 3.12.1, torch 2.9)",
    ):
        assert shown in card, shown
    assert "nats (lower is better) | 0.25 ± 0.031 | 0.25 |" in cards["beta-0.2-lora"], "beside its own dense model"
    assert "control" in cards["alpha-dense-lora"] and "ratio asked" not in cards["alpha-dense-lora"]
    assert "trust_remote_code" not in card


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, "refit block |"),
        ({"prune__refit_final_norm": True}, "refit block, then the final norm |"),
        ({"prune__refit_norms": True}, "refit block, then all norms |"),
        ({"prune__refit_norms": True, "prune__refit": "dense"}, "refit dense |"),
        ({"prune__refit_iterations": 1}, "refit block (1 iteration in its last step) |"),
        ({"prune__refit_iterations": 6, "prune__refit": "dense"}, "refit dense |"),
        (
            {"prune__refit_iterations": 6, "prune__refit_copies": 1},
            "refit block (6 iterations in its last step) on the windows and 1 redrawn copy of each |",
        ),
        ({"prune__refit_copies": 1}, "refit block on the windows and 1 redrawn copy of each |"),
        (
            {"prune__refit_copies": 2, "prune__refit_norms": True},
            "refit block on the windows and 2 redrawn copies of each, then all norms |",
        ),
    ],
)
def test_people_read_what_was_refitted(config, tmp_path, settings, shown):
    assert shown in texts(config, tmp_path, **settings)["alpha-0.2-lora"]


def test_sentences_read_well_whatever_goes_and_however_little_was_read(config, tmp_path):
    once = {"calibration__samples": 1, "evaluation__fidelity__windows": 1, "recovery__max_steps": 1}
    once |= {"evaluation__limit": 1, "evaluation__num_fewshot": 5}
    cards = texts(config, tmp_path, methods=["surgeon-plain"], runtime__ranks=1, **once)
    card = cards["alpha-0.2-lora"]
    for shown in (
        "`surgeon-plain`: neurons, KV groups and layers go",
        "| 1 window of 32 tokens of the file `calibration.jsonl`",
        "held-out text, 1 window of 32 tokens",
        "tiny_choice (lm-eval, 5-shot, at most 1 document a task)",
        "1 step)",
        "method of the project's, or else its author's own (`--methods surgeon-plain.yaml`)",
    ):
        assert shown in card, shown
    assert "author's own" not in cards["alpha-dense-lora"]
    once |= {"recovery__max_steps": None, "recovery__epochs": 1.0}
    assert "batch size 2, 1 epoch)" in texts(config, tmp_path / "epoch", **once)["alpha-0.2-lora"]


def test_a_model_that_reads_images_is_found_among_its_kind(config, tmp_path, monkeypatch):
    monkeypatch.setitem(DENSE, "alpha", replace(DENSE["alpha"], has_vision=True))
    cards = texts(config, tmp_path)
    kinds = {name: ModelCard(card).data.pipeline_tag for name, card in cards.items()}
    assert (kinds["alpha-0.2-lora"], kinds["beta-0.2-lora"]) == ("image-text-to-text", "text-generation")
    assert "AutoModelForImageTextToText" in cards["alpha-0.2-lora"]


def test_it_says_in_how_many_parts_the_model_was_pruned(config, tmp_path):
    cards = texts(config, tmp_path, methods=["surgeon-uniform", "surgeon-uniform-2-steps"])
    told = {name: re.search(r"scored by [^;]*", card)[0] for name, card in cards.items() if "scored by" in card}
    assert told.pop("alpha-0.2-surgeon-uniform-lora") == "scored by surgeon"
    assert told.pop("alpha-0.2-surgeon-uniform-2-steps-lora") == "scored by surgeon anew in each of 2 parts"


def test_shells_and_people_read_odd_names_and_ratios_as_they_are(config, tmp_path):
    plan, store = planned(config)[1], Store(tmp_path / "store")
    fill(store, plan)
    subject = Subject.of("name", replace(plan.cells[1], model="my $model", ratio=0.125), plan, store, DENSE["alpha"])
    card = model_card(subject)
    assert "--models 'my $model' --ratios 0.125 " in card and "12.5% of its parameters" in card


def test_names_read_as_they_are_once_rendered(config, tmp_path):
    plan, store = planned(config)[1], Store(tmp_path / "store")
    fill(store, plan)
    odd = replace(next(cell for cell in plan.cells if cell.method), method="a`|*b*", model="my_`model`\n<b>")
    subject = Subject.of("_name_", odd, plan, store, DENSE["alpha"])
    files = {**subject.manifest["files"], "License.txt": "0123"}
    scores = {**SCORES, "tasks": {"*task*": {"_acc_": 0.5}}}
    evaluated = {**subject.manifests[odd.evaluate], "metrics": scores}
    subject = replace(
        subject,
        manifest={**subject.manifest, "files": files},
        manifests={**subject.manifests, odd.evaluate: evaluated},
    )
    parsed = MarkdownIt("commonmark").enable("table").parse(model_card(subject).split("---\n\n", 1)[1])
    shown = ["".join(part.content or " " for part in it.children) for it in parsed if it.type == "inline"]
    assert "_name_" in shown and "my_`model` <b>, a local checkpoint, 100 parameters" in shown
    assert "see License.txt" in shown and any(it.startswith("a`|*b*: neurons go") for it in shown)
    assert any(it.startswith("*task* (lm-eval") for it in shown) and "_acc_" in shown
    assert not [it for it in parsed if "html" in it.type], "no name is a tag"


def test_a_base_of_the_hub_is_linked_and_its_commit_named(config, tmp_path):
    plan, store = planned(config)[1], Store(tmp_path / "store")
    fill(store, plan)
    pruned = next(cell for cell in plan.cells if cell.ratio == 0.2)
    subject = Subject.of("name", pruned, plan, store, DENSE["alpha"])
    subject.__dict__["base"] = BaseModel("alpha", "digest", "org/model", "0123", {"license": "mit", "language": ["en"]})
    card = model_card(subject)
    data = ModelCard(card).data
    assert (data.base_model, data.license, data.language) == ("org/model", "mit", ["en"])
    for shown in (
        "[org/model](https://huggingface.co/org/model) with 20% of its parameters pruned",
        "| base model | org/model, commit `0123`, 100 parameters |",
        "| licence of the base model | mit |",
        "--models org/model@0123 --ratios 0.2",
    ):
        assert shown in card, shown


def test_bars_in_names_end_no_cell_of_a_table(config, tmp_path):
    plan, store = planned(config)[1], Store(tmp_path / "store")
    fill(store, plan)
    pruned = next(cell for cell in plan.cells if cell.method)
    subject = Subject.of("name", replace(pruned, method="a|b"), plan, store, DENSE["alpha"])
    facts = [line for line in model_card(subject).splitlines() if line.startswith("| method ")]
    assert [len(re.split(r"(?<!\\)\|", line)) for line in facts] == [4]


@pytest.mark.parametrize(
    ("told", "why"), [({}, "Its layers differ"), ({"attention_ranks": {"q_proj": 5}}, "Its attention has matrices of")]
)
def test_it_says_why_remote_code_is_needed(config, tmp_path, monkeypatch, told, why):
    monkeypatch.setitem(SHAPE, "attention_ranks", told.get("attention_ranks"))
    monkeypatch.setattr("hfprune_dist.results.card_subject.Subject.files", ["modeling_pruned.py"], raising=False)
    card = texts(config, tmp_path)["alpha-0.2-lora"]
    assert f"{why}" in card and "trust_remote_code=True" in card
    assert ("rank of `q_proj` 5" in card) == bool(told)


def test_no_path_of_this_machine_is_in_it(config, tmp_path):
    here = [str(config.parent), str(tmp_path), "/tmp"]
    cards = texts(config, tmp_path, evaluation__tasks=["/home/me/task.yaml"])
    assert len(cards) == 6
    for card in cards.values():
        assert not [place for place in [*here, "/home"] if place in card] and "task.yaml" in card


def test_a_checkpoint_without_scores_has_a_card_and_one_that_is_not_there_has_none(config, tmp_path):
    cards = texts(config, tmp_path, but=["evaluate"])
    assert "Not evaluated yet." in cards["alpha-0.2-lora"]
    assert ModelCard(cards["alpha-0.2-lora"]).data.eval_results is None
    assert texts(config, tmp_path / "none", but=["recover"]) == {}


def test_the_adapter_names_what_it_was_trained_on(config, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    configs = texts(config, tmp_path, "adapter/adapter_config.json")
    read = json.loads(configs["alpha-0.2-lora"])
    assert read["r"] == 4 and read["base_model_name_or_path"].startswith("../store/prune/")
    base = json.loads(configs["alpha-dense-lora"])["base_model_name_or_path"]
    assert (tmp_path / "here" / base).resolve() == config.parent / "alpha"
    gone = texts(config, tmp_path / "gone", "adapter/adapter_config.json", but=["prune"])
    assert json.loads(gone["alpha-0.2-lora"])["base_model_name_or_path"] is None


def test_a_checkpoint_that_is_committed_meanwhile_is_left_for_the_next_time(config, tmp_path, monkeypatch):
    plan, store = planned(config)[1], Store(tmp_path / "store")
    fill(store, plan)
    named, read = named_checkpoints(plan, store, DENSE), Store.manifest
    unseen = {cell.producers[-1] for cell in plan.cells if cell.label == "alpha 0.2 + lora"}

    def read_too_early(store, stage_id):
        if stage_id not in unseen:
            return read(store, stage_id)
        unseen.remove(stage_id)
        return None

    monkeypatch.setattr(Store, "manifest", read_too_early)
    assert named_checkpoints(plan, store, DENSE).keys() == named.keys() - {"alpha-0.2-lora"}


def test_every_file_is_a_link_to_the_artifact_or_a_text_of_its_own(config, tmp_path):
    plan, store = planned(config)[1], Store(tmp_path / "store")
    fill(store, plan)
    cells = checkpoint_names(plan.cells)
    for name, contents in named_checkpoints(plan, store, DENSE).items():
        folder = store.path(cells[name].producers[-1])
        assert contents.links == {file: folder / file for file in ("config.json", "model.safetensors")}
        assert contents.texts.keys() == {"README.md", "adapter/adapter_config.json"}
        assert contents.second_name == with_digits(name, cells[name])


def test_a_base_of_the_hub_is_named_with_its_licence(tmp_path):
    snapshot = tmp_path / "models--some-org--a-model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    card = (
        "---\nlicense: other\nlicense_name: a-licence\nlicense_link: LICENSE\nlanguage: [en]\ntags: [x]\n---\n# Hello\n"
    )
    (snapshot / "README.md").write_text(card)
    base = BaseModel.of("m", Input("digest", str(snapshot), content="commit"))
    assert (base.hub_id, base.revision, base.licence) == ("some-org/a-model", "0123", "a-licence")
    assert base.carried == {
        "license": "other",
        "license_name": "a-licence",
        "license_link": "LICENSE",
        "language": ["en"],
    }
    (snapshot / "README.md").write_text("---\nlanguage: [en, no]\n---\n")
    norwegian = BaseModel.of("m", Input("digest", str(snapshot), content="commit"))
    assert norwegian.carried == {"language": ["en", "no"]}
    (snapshot / "README.md").write_text("---\n: [\n---\n")
    (snapshot / "config.json").write_text('{"license": "mit"}')
    assert BaseModel.of("m", Input("digest", str(snapshot), content="checkpoint")) == BaseModel(
        "m", "digest", None, None, {"license": "mit"}
    )
    assert BaseModel.of("m", Input("digest", str(snapshot), content="checkpoint")).licence == "mit"
    assert norwegian.licence is None
