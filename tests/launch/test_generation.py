"""The cost of generating with a sharded model is stated before the first stage, where what can't work is refused."""

import json
import sys

import pytest
from hfprune_launch.local import hardware
from hfprune_launch.modes import generation, sweep_run
from hfprune_launch.modes.generation import Generation
from hfprune_launch.slurm.profile import load_profile
from hfprune_launch.sweep import main
from sweeps import in_process, make_inputs, planned

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.planning import memory
from hfprune_dist.planning.dimensions import dimensions_of
from hfprune_dist.planning.memory import Gpus

WRITES = """\
task: tiny_writing
dataset_path: json
dataset_kwargs: {data_files: {train: answers.jsonl}}
test_split: train
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
"""
ALPHA = {"models": ["alpha"], "evaluation__tasks": ["tiny_choice", "tiny_writing"], "methods": ["hfprune"]}
MEASURED = {"models": ["alpha"], "methods": ["hfprune"], "efficiency__enabled": True, "efficiency__new_tokens": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    file = make_inputs(tmp_path_factory.mktemp("generation"))
    tasks = file.parent / "tasks"
    (tasks / "answers.jsonl").write_text(json.dumps({"question": "ban", "answer": "der"}) + "\n")
    (tasks / "writing.yaml").write_text(WRITES)
    return file


def remarks(inputs, profile=None, **overrides):
    config, plan = planned(inputs, **overrides)
    return list(Generation(config, plan, list(plan.stages), profile).remarks())


def profile_in(folder, text):
    file = folder / "profile.yaml"
    file.write_text(text)
    return load_profile(str(file), folder / "none")


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_every_token_gathers_is_told_of_tasks_that_generate(inputs, ranks):
    (told,) = remarks(inputs, **ALPHA, runtime__sharding="zero3", runtime__ranks=ranks)
    gathered = dimensions_of(open_checkpoint(inputs.parent / "alpha").config).parameters * 4 / 1e9
    assert told.startswith(f"tiny_writing: the model generates, and alpha is sharded over {ranks} ranks")
    assert f"gathers all {gathered:,.3g} GB of it for every token" in told and "tiny_choice" not in told


def test_a_model_has_the_name_that_the_table_gives_it(inputs):
    """Its folder's name is no help: for a snapshot of the hub, that is a commit."""
    own = {"models": ["mine"], "aliases": {"mine": {"path": str(inputs.parent / "alpha")}}}
    (told,) = remarks(inputs, **ALPHA | own, runtime__sharding="zero3", runtime__ranks=2)
    assert "mine is sharded over 2 ranks" in told


@pytest.mark.parametrize(
    "overrides",
    [
        {"runtime__sharding": "auto"},
        {"runtime__sharding": "replicate"},
        {"runtime__sharding": "zero3", "runtime__ranks": 1},
        {"runtime__sharding": "zero3", "evaluation__tasks": ["tiny_choice"]},
        {"runtime__sharding": "zero3", "evaluation__tasks": []},
    ],
    ids=str,
)
def test_nothing_is_told_where_nothing_is_gathered_or_generated(inputs, overrides):
    assert remarks(inputs, **ALPHA | overrides) == []


@pytest.mark.parametrize(("gib", "sharded"), [(1e-7, True), (80, False)])
def test_a_profiles_gpus_decide_what_is_sharded(inputs, tmp_path, monkeypatch, gib, sharded):
    monkeypatch.setattr(memory, "LIVE_PARAMETERS", 0)  # or all of a model this small would be gathered
    profile = profile_in(tmp_path, f"nodes: 2\ntasks_per_node: 2\ngpus_per_node: 2\ngpu_memory_gib: {gib}\n")
    told = remarks(inputs, profile, **ALPHA)
    assert len(told) == sharded and (not told or "over 4 ranks" in told[0])


def test_efficiency_is_of_whole_models(inputs):
    (told,) = remarks(inputs, **MEASURED, runtime__sharding="zero3")
    assert told == "efficiency is measured with whole models on rank 0, whatever runtime.sharding says"
    assert remarks(inputs, **MEASURED) == []


@pytest.mark.parametrize(("memory", "fits"), [(2**20, False), (2**36, True), (None, True)])
def test_models_that_rank_0_has_no_room_to_measure_are_refused(inputs, monkeypatch, memory, fits):
    gpus = None if memory is None else Gpus(1, 2, memory)
    monkeypatch.setattr(generation, "gpus_here", lambda _runtime: gpus)
    config, plan = planned(inputs, **MEASURED)
    asked = Generation(config, plan, list(plan.stages), None).require_room
    if fits:
        asked()
        return
    with pytest.raises(UserError, match=r"efficiency alpha.*: about \d+ GiB on the GPU of rank 0.*efficiency.enabled"):
        asked()
    Generation(config, plan, [it for it in plan.stages if not it.startswith("efficiency")], None).require_room()


@pytest.mark.parametrize("mode", [["--dry-run"], []], ids=["dry run", "run"])
def test_it_is_said_before_the_first_stage(inputs, tmp_path, monkeypatch, mode):
    said_before = []

    def begin(*_):
        said_before.append(sys.stdout.getvalue())
        return 1

    monkeypatch.setattr(hardware, "count_gpus", lambda: 0)
    monkeypatch.setattr(sweep_run, "_run_here", begin)
    settings = ["models=[alpha]", "evaluation.tasks=[tiny_writing]", "runtime.sharding=zero3", "runtime.ranks=2"]
    asked = ["--config", inputs, "--out", tmp_path / "out", *(it for each in settings for it in ("--set", each))]
    code, shown, _ = in_process(main, *asked, *mode)
    assert code == len(said_before) == (not mode)
    told = " ".join((said_before or [shown])[0].split())
    assert "note: tiny_writing: the model generates, and alpha is sharded over 2 ranks" in told
