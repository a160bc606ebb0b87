"""Recovery by distillation on calibration windows: closer to the dense model, on any number of real ranks."""

import shutil

import pytest
import torch
from made_stages import being_made, stage_of
from masking import write
from ranks import SoloWorld, finish, killing, metrics_of, run_stage
from shapes import divergence
from tiny import save_tiny
from trained import assert_same_weights, losses_of, weights_of
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.training import Training
from hfprune_dist.data.windows import save_windows
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input
from hfprune_dist.structures.kept import Kept
from hfprune_dist.training.teacher_states import write_dense_states

REFERENCE, PRUNE = stage_of("reference", "tiny", {}, {}), stage_of("prune", "tiny", {}, {})
PASS = stage_of("importance", "tiny", {}, {})
WINDOWS, TOKENS, MICRO_BATCH = 6, 24, 2
RUNTIME = {"collective_timeout_minutes": 1, "save_every_steps": 3}


def windows():
    return torch.randint(3, 264, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A store with a pruned model, whose layers differ in width, and the reference of its dense original."""
    folder = tmp_path_factory.mktemp("distill")
    dense = open_checkpoint(save_tiny(folder / "dense"))
    store = Store(folder / "store")
    stream = LayerStream(dense, windows(), torch.float32, MICRO_BATCH, SoloWorld())
    with being_made(store, REFERENCE) as draft:
        write_dense_states(stream, draft, lambda layers: None)
    with being_made(store, PASS) as draft:
        save_windows(windows(), draft)
    kept = Kept.of_all_layers({"neurons": [torch.arange(0, 48, 2), torch.arange(30)]})
    with being_made(store, PRUNE) as draft:
        write(dense, kept, draft)
    return folder


def lay_out(source, folder, teacher="reference", **settings):
    """Copy the source's store, and return it with a stage to run in it."""
    shutil.copytree(source / "store", folder / "store")
    defaults = {
        "text": "calibration",
        "objective": "distill",
        "dropout": 0.0,
        "epochs": 6.0,
        "batch_size": 4,
        "micro_batch_size": MICRO_BATCH,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "rank": 4,
        "alpha": 8,
        "dtype": "float32",
    }
    teachers = {"reference": REFERENCE.as_input(), "dense": Input("dense", str(source / "dense"))}
    inputs = {"model": PRUNE.as_input(), "windows": PASS.as_input(), teacher: teachers[teacher]}
    inputs |= {"head": teachers["dense"]} if teacher == "dense" else {}  # as in a later round
    params = {"recovery": Training(**defaults | settings), "seed": 0}
    return Store(folder / "store"), stage_of("recover", "tiny", params, inputs)


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    store, stage = lay_out(source, tmp_path_factory.mktemp("two"))
    finish(store, stage, 2, **RUNTIME)
    return store, stage


@pytest.mark.slow
def test_plain_transformers_loads_a_closer_model(source, uninterrupted):
    store, stage = uninterrupted
    dense = AutoModelForCausalLM.from_pretrained(source / "dense")
    pruned, distilled = (
        AutoModelForCausalLM.from_pretrained(store.handle(made.id).artifact, trust_remote_code=True)
        for made in (PRUNE, stage)
    )
    assert [layer.mlp.gate_proj.out_features for layer in distilled.model.layers] == [24, 30]
    before, after = (divergence(dense, model, windows()) for model in (pruned, distilled))
    assert after < 0.7 * before
    # The logged values are the divergence itself: a step's mean over its windows, the first before anything was learnt.
    losses = losses_of(store, stage)
    assert sum(losses[:2]) / 2 == pytest.approx(before, rel=0.05)
    metrics = metrics_of(store, stage)
    assert (metrics["windows"], metrics["tokens"], metrics["steps"]) == (WINDOWS, WINDOWS * TOKENS, 12)
    assert (metrics["first_loss"], metrics["final_loss"]) == (losses[0], losses[-1])


@pytest.mark.slow
def test_another_number_of_ranks_comes_close_and_so_it_does_after_a_kill(source, uninterrupted, tmp_path):
    """Three ranks have more places than a step has windows: the places left over must not count."""
    store, stage = lay_out(source, tmp_path)
    assert run_stage(store, stage, 3, environment=killing(0, 4, "/snapshot."), **RUNTIME).returncode != 0
    assert "step 1/" not in finish(store, stage, 3, **RUNTIME)
    assert losses_of(store, stage) == pytest.approx(losses_of(*uninterrupted), rel=1e-3)
    # Adam would hide a gradient that is too large by a factor, such as the number of ranks.
    norms = losses_of(store, stage, "grad_norm")
    assert norms == pytest.approx(losses_of(*uninterrupted, "grad_norm"), rel=0.02)
    expected = weights_of(uninterrupted[0].handle(stage.id).artifact)
    for name, tensor in weights_of(store.handle(stage.id).artifact).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.02, atol=2e-3)


@pytest.mark.slow
def test_all_weights_are_trained_beside_the_dense_model_and_a_kill_changes_nothing(source, tmp_path):
    """Two ranks share the optimizer."""
    settings = {"method": "full", "learning_rate": 2e-3, "epochs": 3.0}
    (tmp_path / "whole").mkdir()
    store, stage = lay_out(source, tmp_path / "whole", "dense", **settings)
    finish(store, stage, 2, **RUNTIME)
    (tmp_path / "killed").mkdir()
    again, _ = lay_out(source, tmp_path / "killed", "dense", **settings)
    assert run_stage(again, stage, 2, environment=killing(1, 4, "/snapshot-"), **RUNTIME).returncode != 0
    assert "step 1/" not in finish(again, stage, 2, **RUNTIME)
    dense = AutoModelForCausalLM.from_pretrained(source / "dense")
    folders = [each.handle(stage.id).artifact for each in (store, again)]
    models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in folders]
    assert divergence(dense, models[0], windows()) < 0.8 * losses_of(store, stage)[0]
    assert_same_weights(*folders)
    assert not (folders[0] / "adapter").exists()
    changed = weights_of(store.handle(PRUNE.id).artifact)
    assert all(not torch.equal(tensor, changed[name]) for name, tensor in weights_of(folders[0]).items())
