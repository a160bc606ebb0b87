"""Cards as the hub reads them, for plans made from a real configuration; no stage runs here."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from made_stages import being_made
from sweeps import planned

from hfprune_dist.results.card import BaseModel, Card, contents_of_checkpoints
from hfprune_dist.results.checkpoints import checkpoint_names
from hfprune_dist.results.rows import DenseModel, collect_rows
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input

SCORES = {
    "other_texts": {"news": {"kl": 1.5}},
    "fidelity": {"perplexity": 12.5, "kl": 0.25, "kl_stderr": 0.03125, "top1_agreement": 0.75, "tokens": 124},
    "tasks": {"tiny_choice": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6, "acc_norm_stderr": None}},
}
SHAPE = {"ratio_reached": 0.1987, "parameters": 80, "intermediate_size": None, "intermediate_sizes": [7, 9]}
DENSE = {name: DenseModel(100, {"intermediate_size": 48}) for name in ("alpha", "beta")}
PRUNED = "alpha-0.2-surgeon-uniform-block-lora"
PROVENANCE = {"hfprune_dist": "0.1.0", "git_commit": "0123abc", "dirty_diff_sha256": "f", "python": "3.12.1"}
PROVENANCE |= {"packages": {"torch": "2.9"}}


def fill(store, plan, config):
    for stage in plan.stages.values():
        fidelity = SCORES["fidelity"] | ({"kl": 0.0} if stage.label == "alpha dense" else {})
        metrics = {**SHAPE, **SCORES, "fidelity": fidelity}
        record = {
            "provenance": PROVENANCE,
            "config": config.model_dump(mode="json"),
            "world_size": 1,
            "wall_time_s": 1.0,
        }
        with being_made(store, stage, metrics=metrics, **record) as draft:
            (draft / "adapter").mkdir()
            (draft / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": null, "r": 4}')
            for name in ("config.json", "model.safetensors"):
                (draft / name).write_text("content")


def cards_of(config, out, **settings):
    """Map the name of each checkpoint of a sweep to its card."""
    made_by, plan = planned(config, **settings)
    store = Store(out / "store")
    fill(store, plan, made_by)
    return {name: made.texts["README.md"] for name, made in contents_of_checkpoints(plan, store, DENSE).items() if made}


@pytest.fixture(scope="module")
def card_of(config, tmp_path_factory):
    """Return a function that writes the card of a row's checkpoint, which may have further files."""
    (made_by, plan), store = planned(config), Store(tmp_path_factory.mktemp("made") / "store")
    fill(store, plan, made_by)
    rows = dict(zip(plan.cells, collect_rows(plan, store, DENSE), strict=True))

    def card_of(label="alpha 0.2 surgeon-uniform-block + lora", files=(), dense=DENSE["alpha"], **carried):
        cell = next(cell for cell in plan.cells if cell.label == label)
        card = Card("name", cell, rows, plan, store, dense)
        card.manifest["files"] |= dict.fromkeys(files)
        card.base = replace(card.base, carried=carried)
        return card.text()

    return card_of


def test_the_hub_reads_what_was_measured(config, tmp_path):
    cards = cards_of(config, tmp_path)
    data = ModelCard(cards[PRUNED]).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", PRUNED)
    assert data.tags == ["hfprune", "pruned", "model-compression", "surgeon-uniform-block"]
    assert data.base_model is None and data.license is None
    results = {
        (score.dataset_config or score.dataset_type, score.metric_type): score.metric_value
        for score in data.eval_results
    }
    fidelity = {("held-out", "kl"): 0.25, ("held-out", "top1_agreement"): 0.75, ("held-out", "perplexity"): 12.5}
    assert results == {**fidelity, ("news", "kl"): 1.5, ("tiny_choice", "acc"): 0.5, ("tiny_choice", "acc_norm"): 0.6}
    assert ModelCard(cards["alpha-dense-lora"]).data.tags == ["hfprune"], "nothing of it was pruned"


def test_people_read_how_it_was_made(config, tmp_path):
    cards = cards_of(config, tmp_path)
    card = cards[PRUNED]
    for shown in (
        "| ratio asked | 0.2 of all parameters |",
        "| calibrated on | the file `calibration.jsonl` |",
        "| trained on | the file `pairs.jsonl` |",
        "| reached | 0.1987 | 0.0000 |",
        "| width | 7-9 | 48 |",
        "| KL | 0.250±0.031 | 0.000±0.031 |",
        "| tiny_choice | 60.0 | 60.0 |",
        "- KL: mean divergence of the next token's distribution from the dense model's, nats per token, lower is ",
        'AutoModelForCausalLM.from_pretrained("alpha-0.2-surgeon-uniform-block-lora")',
        "by\n\n```bash\npython launch/sweep.py --config recipe.yaml\n```",
        "It reads, from its own folder, `alpha`, `calibration.jsonl`, ",
        "With hfprune_dist 0.1.0 at commit `0123abc` with changes (Python 3.12.1, torch 2.9)",
    ):
        assert shown in card, shown
    assert "| KL | 0.250±0.031 | 0.250±0.031 |" in cards["beta-0.2-surgeon-uniform-block-lora"], "its own dense model's"
    assert "control" in cards["alpha-dense-lora"] and "ratio asked" not in cards["alpha-dense-lora"]


def test_it_says_how_the_model_is_loaded_and_what_its_adapter_is_of(card_of):
    plain = card_of()
    assert "trust_remote_code" not in plain and ModelCard(plain).data.pipeline_tag == "text-generation"
    assert 'PeftModel.from_pretrained(base, "name/adapter")' in plain and "makes with `--set recovery." in plain
    assert "of the base model, `alpha`, a local" in card_of("alpha dense + lora")
    card = card_of(files=["modeling_pruned.py"])
    assert "`trust_remote_code` loads the class in" in card and "trust_remote_code=True" in card
    card = card_of(dense=replace(DENSE["alpha"], has_vision=True))
    assert "AutoModelForImageTextToText" in card and ModelCard(card).data.pipeline_tag == "image-text-to-text"


def test_several_licences_are_told(card_of):
    card = card_of(license=["mit", "apache-2.0"])
    assert "| licence of the base model | mit, apache-2.0 |" in card
    assert ModelCard(card).data.license == ["mit", "apache-2.0"]


def test_it_says_how_the_model_was_trained(config, tmp_path):
    recipes = {"lora": {}, "distilled": {"objective": "distill"}}
    cards = cards_of(config, tmp_path, methods=["hfprune", "loraprune"], ratios=[0.1], recovery__recipes=recipes)
    told = "then fine-tuned with LoRA towards `alpha`'s own predictions to recover."
    assert told in cards["alpha-0.1-hfprune-distilled"]
    assert "then fine-tuned with LoRA to recover." in cards["alpha-0.1-hfprune-lora"]
    card = cards["alpha-0.1-loraprune"]
    assert "pruned by the method `loraprune`, while it was fine-tuned with LoRA to recover." in card
    assert "adapter too, of the base model, `alpha`, a local checkpoint, before units were cut" in card
    assert "calibrated on" not in card


@pytest.mark.parametrize("own_method", [False, True])
def test_its_recipe_plans_the_same_stages(config, tmp_path, own_method):
    """Elsewhere, with the files that it names beside it."""
    method, settings = "surgeon-uniform-block", {"evaluation__limit": 5, "recovery__max_steps": 3, "seed": 7}
    settings["rounds"] = [0.1, 0.2]
    if own_method:
        method = str(tmp_path / "mine.yaml")
        Path(method).write_text("{criterion: entropy, refit: layerwise}")
    else:
        settings["recovery__recipes"] = {"none": {"method": "none"}, "lora": {}, "more": {"objective": "distill"}}
    made_by, plan = planned(config, methods=[method, "hfprune"], **settings)
    store = Store(tmp_path / "out" / "store")
    fill(store, plan, made_by)
    cells = checkpoint_names(plan.cells)
    for name, made in contents_of_checkpoints(plan, store, DENSE).items():
        elsewhere, cell = tmp_path / "elsewhere" / name, cells[name]
        elsewhere.mkdir(parents=True)
        for file, text in made.texts.items():
            (elsewhere / file).write_text(text)
        if own_method:
            (elsewhere / "mine.yaml").write_text(Path(method).read_text())
        for source in ("alpha", "beta", "calibration.jsonl", "heldout.jsonl", "pairs.jsonl", "tasks"):
            (elsewhere / source).symlink_to(config.parent / source)
        _, again = planned(elsewhere / "recipe.yaml")
        (row,) = [row for row in again.cells if row.label == cell.label]
        assert (row.producers[-1], row.evaluate) == (cell.producers[-1], cell.evaluate)
        assert {row.model for row in again.cells} == {cell.model}


@pytest.mark.parametrize("renamed", ["recipe", "method"])
def test_what_has_another_name_now_has_no_recipe(config, tmp_path, renamed):
    """Nothing runs again, and the one that was recorded speaks of the former name."""
    methods = {name: str(tmp_path / f"{name}.yaml") for name in ("before", "now")}
    for method in methods.values():
        Path(method).write_text("{criterion: entropy, refit: layerwise}")
    store, plans = Store(tmp_path / "out" / "store"), []
    for name in ("before", "now"):
        recipe, method = (name, methods["now"]) if renamed == "recipe" else ("lora", methods[name])
        settings, plan = planned(config, methods=[method], recovery__recipes={recipe: {"rank": 8}})
        plans.append(plan)
        if name == "before":
            fill(store, plan, settings)
    made = contents_of_checkpoints(plans[1], store, DENSE)
    assert plans[0].stages.keys() == plans[1].stages.keys() and made
    assert not [name for name, contents in made.items() if "recipe.yaml" in contents.texts and "dense" not in name]


def test_a_base_of_the_hub_is_named_with_its_licence(tmp_path):
    snapshot = tmp_path / "models--some-org--a-model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    stated = {"license": "other", "license_name": "a-licence", "license_link": "LICENSE", "language": ["en"]}
    (snapshot / "README.md").write_text(f"---\n{yaml.safe_dump(stated | {'tags': ['x']})}\n---\n# Hello\n")
    base = BaseModel.from_input("m", Input("digest", str(snapshot), content="commit"))
    assert base == BaseModel("m", "some-org/a-model", "0123", stated)
    (snapshot / "README.md").write_text("---\nlanguage: [en, no]\n---\n")
    norwegian = BaseModel.from_input("m", Input("digest", str(snapshot), content="commit"))
    assert norwegian.carried == {}, "YAML takes no for false"
    (snapshot / "README.md").write_text("---\n: [\n---\n")
    (snapshot / "config.json").write_text('{"license": "mit"}')
    local = BaseModel.from_input("m", Input("digest", str(snapshot), content="checkpoint"))
    assert local == BaseModel("m", None, None, {"license": "mit"})
