"""The prune stage on real ranks, and death at every point of it."""

import itertools
import json

import pytest
import torch
from faults.kill import die_in_fork
from ranks import run_stage
from safetensors.torch import save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.artifacts import Store
from hfprune_dist.config import RuntimeConfig
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.identity import FileHashes
from hfprune_dist.parallel.world import World
from hfprune_dist.plan import Input, Stage
from hfprune_dist.progress import Progress
from hfprune_dist.stages import prune
from hfprune_dist.stages.context import Context

IMPORTANCE = Stage("importance", "llama", {}, {})


class SoloWorld(World):
    """A world of one rank without a process group."""

    def broadcast(self, value, source=0):
        return value

    def gather(self, value):
        return [value]


def prepare(folder, shard_size="5GB", criterion="entropy"):
    """A store with an importance artifact of random scores by every criterion, and the stage that prunes by one."""
    store = Store(folder / "store")
    draft = store.open_draft(IMPORTANCE.id)
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{layer}.{name}" for name in CRITERIA for layer in range(2)]
    scores = {name: torch.rand(48, generator=generator, dtype=torch.float64) for name in names}
    save_file(scores, draft / "importance.safetensors")
    store.commit(IMPORTANCE, draft, {"metrics": {}})
    model = save_tiny(folder / "model", shard_size=shard_size)
    params = {"ratio": 0.2, "criterion": criterion, "allocation": "uniform", "refit": "none", "multiple_of": 1}
    identity = FileHashes(None).of_folder(model)
    stage = Stage("prune", "llama", params, {"model": Input(identity, str(model)), "importance": IMPORTANCE.as_input()})
    return store, stage, scores


def run_solo(store, stage):
    world = SoloWorld(0, 1, 0, 1, torch.device("cpu"))
    store.work(stage.id).mkdir(parents=True, exist_ok=True)
    prune.run(Context(stage, store, world, RuntimeConfig(), Progress(None), {}, {}, 1))


def weights_of(store, stage):
    return {file.name: file.read_bytes() for file in store.path(stage.id).glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_real_ranks_write_a_checkpoint_that_plain_transformers_loads(tmp_path, ranks):
    store, stage, scores = prepare(tmp_path, shard_size="20KB")
    result = run_stage(store, stage, ranks)
    assert result.returncode == 0, result.stderr[-2000:]
    kept = json.loads((store.path(stage.id) / "kept.json").read_text())["layers"]
    model = AutoModelForCausalLM.from_pretrained(store.path(stage.id))
    metrics = store.manifest(stage.id)["metrics"]
    assert metrics["intermediate_size"] == model.config.intermediate_size == 14
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["ratio_reached"] == pytest.approx(0.2, abs=0.01)
    for layer in range(2):
        assert kept[layer] == sorted(scores[f"layers.{layer}.entropy"].topk(14).indices.tolist())


def test_each_criterion_keeps_its_own_neurons(tmp_path):
    kept_by = {}
    for criterion in CRITERIA:
        (tmp_path / criterion).mkdir()
        store, stage, scores = prepare(tmp_path / criterion, criterion=criterion)
        run_solo(store, stage)
        kept = json.loads((store.path(stage.id) / "kept.json").read_text())["layers"]
        for layer in range(2):
            assert kept[layer] == sorted(scores[f"layers.{layer}.{criterion}"].topk(14).indices.tolist())
        kept_by[criterion] = kept
    assert len({str(kept) for kept in kept_by.values()}) == len(CRITERIA)


def test_death_at_every_point_ends_with_the_same_weights(tmp_path):
    (tmp_path / "reference").mkdir()
    reference, stage, _ = prepare(tmp_path / "reference")
    run_solo(reference, stage)
    expected = weights_of(reference, stage)
    for kill_at in itertools.count(1):
        (tmp_path / str(kill_at)).mkdir()
        store, _, _ = prepare(tmp_path / str(kill_at))
        died = die_in_fork(lambda store=store: run_solo(store, stage), kill_at, store.root)
        assert store.verify(stage.id).state in ("missing", "done")
        if store.verify(stage.id).state == "missing":
            run_solo(store, stage)
        assert weights_of(store, stage) == expected
        if not died:
            break
    assert kill_at > 10


def test_an_artifact_that_rotted_is_set_aside_before_it_is_used(tmp_path):
    store, stage, _ = prepare(tmp_path)
    file = store.path(IMPORTANCE.id) / "importance.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    world = SoloWorld(0, 1, 0, 1, torch.device("cpu"))
    context = Context(stage, store, world, RuntimeConfig(), Progress(None), {}, {}, 1)
    with pytest.raises(Exception, match=r"content changed.*set aside"):
        context.check_inputs()
    assert store.verify(IMPORTANCE.id).state == "missing"
