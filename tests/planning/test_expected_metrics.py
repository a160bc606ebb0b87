"""Expected metrics of stages that haven't run yet, on a model of a published shape."""

from __future__ import annotations

import pytest
from published import published_model, published_plan
from ranks import ROOT

from hfprune_dist.config.parameters import EvaluateParameters, LoraPruneParameters, PruneParameters, RecoverParameters
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.planning.expected_metrics import ExpectedManifests
from hfprune_dist.planning.gpu_needs import Gpus
from hfprune_dist.planning.model_shape import ModelShape
from hfprune_dist.planning.stage_costs import StageCosts

FILES = (ROOT / "configs" / "methods").glob("*.yaml")
METHODS = sorted(file.stem for file in FILES if file.stem not in ("hfprune-experts", "reap"))  # which are for experts
GPUS = Gpus(1, 8, 80 * 2**30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return published_model(tmp_path_factory.mktemp("expected"), "llama-2-7b")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_to_a_shape_of_the_ratio_and_to_known_work(model, method):
    _, plan = published_plan([model], [method], GPUS, ratios=[0.3])
    expected = ExpectedManifests(plan, checkpointing=False)
    costs = StageCosts(plan, expected.of)
    for stage in plan.stages.values():
        if isinstance(stage.params, EvaluateParameters):
            assert expected.of(stage.id) is None
            continue
        assert costs.of(stage.id) is not None, stage.kind
        if isinstance(stage.params, PruneParameters | LoraPruneParameters):
            kept = ModelShape.of(model.checkpoint).pruned(expected.of(stage.id)["metrics"])
            gone = sum(dims.layer_parameters for dims in kept.layers)
            whole = model.checkpoint.parameters
            body = ModelShape.of(model.checkpoint).layers[0].body_parameters
            # Rounding widths to multiples removes a little more.
            assert stage.params.ratio - 1e-3 < (body - gone) / whole < stage.params.ratio + 0.02


COMPETING = ["flap", "llm-pruner", "surgeon-any-shape", "wanda-sp"]


@pytest.mark.parametrize(("method", "ratio"), [*((it, 0.7) for it in COMPETING), ("flap", 0.02), ("llm-pruner", 0.5)])
def test_heads_go_with_neurons_however_much_goes(model, method, ratio):
    """MLPs are 64 % of the model, so that neurons alone could not make up a ratio of 0.7."""
    bounds = {"prune__floor": 0.0, "prune__protect_first": 0, "prune__protect_last": 0}
    _, plan = published_plan([model], [method], GPUS, ratios=[ratio], **bounds)
    expected = ExpectedManifests(plan, checkpointing=False)
    (cut,) = (stage for stage in plan.stages.values() if isinstance(stage.params, PruneParameters))
    shape = ModelShape.of(model.checkpoint)
    kept = shape.pruned(expected.of(cut.id)["metrics"])
    removed = shape.mean(lambda dims: dims.body_parameters) - kept.mean(lambda dims: dims.body_parameters)
    assert removed / model.checkpoint.parameters == pytest.approx(ratio, abs=0.005)
    share = 1 - sum(dims.num_key_value_heads for dims in kept.layers) / (32 * 32)
    assert share == pytest.approx(ratio, abs=0.05)


def test_refits_of_norms_add_known_work(model):
    def work(**settings):
        _, plan = published_plan([model], ["surgeon-uniform-block"], GPUS, ratios=[0.3], **settings)
        costs = StageCosts(plan, ExpectedManifests(plan, checkpointing=False).of)
        return next(costs.of(it.id) for it in plan.stages.values() if isinstance(it.params, PruneParameters))

    last, every = work(prune__refit_final_norm=True).operations, work(prune__refit_norms=True).operations
    assert every.total > last.total > work().operations.total


def test_a_recovery_is_known_by_its_steps_its_data_or_not_at_all(model):
    def expected(**recovery):
        settings = {f"recovery__{name}": value for name, value in recovery.items()}
        _, plan = published_plan([model], ["hfprune"], GPUS, **settings)
        manifests = ExpectedManifests(plan, checkpointing=False)
        return next(manifests.of(it.id) for it in plan.stages.values() if isinstance(it.params, RecoverParameters))

    assert expected(max_steps=7)["metrics"]["steps"] == 7
    assert expected(dataset="someone/some-pairs") is None
    assert expected(dataset="someone/some-pairs", max_steps=7)["metrics"]["steps"] == 7
    once, twice = (expected(epochs=epochs)["metrics"]["steps"] for epochs in (1.0, 2.0))
    assert twice == 2 * once > 1000
    told = expected(batch_size=100, epochs=1.1)["metrics"]
    assert told["steps"] == RecoveryConfig(epochs=1.1).steps(Schedule(told["rows"], 100, seed=0).steps_per_epoch)
