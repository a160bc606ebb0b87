"""The components of a stage's time, on a model of a published shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import published_model, published_plan

from hfprune_dist.planning.dimensions import dimensions_of
from hfprune_dist.planning.evaluation_footprint import Evaluate
from hfprune_dist.planning.expected_metrics import ExpectedManifests
from hfprune_dist.planning.gpu_needs import Gpus
from hfprune_dist.planning.importance_job import importance_job
from hfprune_dist.planning.rates import DISK, FLOAT32, HASHING, NETWORK, START_S
from hfprune_dist.planning.stage_times import GRADIENT_BYTES, StageTimes
from hfprune_dist.planning.timing import product_rate, seconds
from hfprune_dist.planning.training_footprint import Train

GPUS = Gpus(1, 8, 80 * 2**30, flops=312e12, link=300e9)
ONE = replace(GPUS, per_node=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return published_model(tmp_path_factory.mktemp("times"), "llama-2-7b")


def first(plan, kind):
    return next(stage for stage in plan.stages.values() if stage.kind == kind)


def of_importance(model, method, gpus=GPUS, **overrides):
    _, plan = published_plan([model], [method], gpus, **overrides)
    stage = first(plan, "importance")
    job = importance_job(stage.params, checkpointing=False)
    return StageTimes(plan, checkpointing=False).of(stage, job, gpus, gpus).seconds


@given(
    steps=st.integers(1, 500),
    rows=st.integers(1, 4),
    ranks=st.integers(1, 8),
    batch_size=st.integers(1, 128),
    whole=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_a_recovery_is_its_steps_on_the_rank_with_most_rows(model, steps, rows, ranks, batch_size, whole):
    gpus = replace(GPUS, per_node=ranks)
    chosen = {"max_steps": steps, "micro_batch_size": rows, "batch_size": batch_size}
    settings = {f"recovery__{name}": value for name, value in chosen.items()}
    config, plan = published_plan([model], ["hfprune"], gpus, **settings)
    dims, job = dimensions_of(model.checkpoint.config), Train.of(config.recovery, 1024, distills=False)
    placed = ONE if whole else gpus
    took = StageTimes(plan, checkpointing=False).of(first(plan, "recover"), job, gpus, placed)
    rounds = -(-batch_size // (rows * ranks))
    training = steps * rounds * seconds(job, dims, placed).longest
    gradients = steps * GRADIENT_BYTES * job.lora_parameters(dims) * (ranks - 1) / ranks / (NETWORK * gpus.link)
    disk = 2 * model.checkpoint.bytes_on_disk * (1 / DISK + 1 / HASHING)
    assert took.seconds == pytest.approx(START_S + disk + training + gradients)
    assert (took.gpus, took.gpu_hours) == (ranks, pytest.approx(ranks * took.hours))


@given(windows=st.integers(1, 99), length=st.integers(64, 2048), ranks=st.integers(1, 8), whole=st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_held_out_window_is_one_forward_pass_and_the_dense_models_logits(model, windows, length, ranks, whole):
    """Its hidden states are read from disk, and the dense model itself isn't even loaded for them."""
    gpus = replace(GPUS, per_node=ranks)
    placed, text = (ONE if whole else gpus), {"windows": windows, "sequence_length": length}
    held_out = {f"evaluation__fidelity__{name}": value for name, value in text.items()}
    _, plan = published_plan([model], ["hfprune"], gpus, ratios=[0.3], evaluation__tasks=[], **held_out)
    times, job = StageTimes(plan, checkpointing=False), Evaluate.of(0, length, itemsize=2)
    dense, *_, pruned = (
        times.of(it, job, gpus, placed).seconds for it in plan.stages.values() if it.kind == "evaluate"
    )
    whole_dims = dimensions_of(model.checkpoint.config)
    width = times._expected.of(first(plan, "prune").id)["metrics"]["intermediate_sizes"][0]
    forward = seconds(Evaluate(1, length), replace(whole_dims, intermediate_size=width), placed)
    head = 2 * length * 32000 * 4096 / product_rate(gpus, 2)
    a_window = max(forward.compute + head, forward.network, forward.launch)
    assert pruned - dense == pytest.approx(-(-windows // ranks) * a_window)


def test_curvature_costs_a_gram_matrix_a_layer_and_half_of_it_on_its_way_for_every_micro_batch(model):
    """In addition to what removes neurons in order, whose share is the same however the windows are cut."""
    tokens, numbers = 1000 * 1024, 32 * 4096**2
    plain, curved = (of_importance(model, it) for it in ("hfprune", "surgeon-uniform"))
    grams = tokens * 2 * numbers / 8 / (FLOAT32 * 312e12)
    assert curved - plain > grams
    slow, slower = (replace(GPUS, link=GPUS.link / factor) for factor in (1e4, 2e4))
    shards = [of_importance(model, "surgeon-uniform", slow, calibration__shard_size=size) for size in (25, 5)]
    assert shards[0] == shards[1], "125 micro-batches of each rank either way"
    sent = 32 * 8 * (125 * packed(4096) + 4 * packed(11008))

    def more(method):
        took = [of_importance(model, method, gpus, calibration__shard_size=5) for gpus in (slow, slower)]
        return took[1] - took[0]

    assert more("surgeon-uniform") - more("hfprune") == pytest.approx(
        sent * 7 / 8 / NETWORK * (1 / slower.link - 1 / slow.link)
    )


def packed(size):
    """Numbers of a symmetric matrix without the blocks below its diagonal."""
    return sum(min(256, size - start) * (size - start) for start in range(0, size, 256))


def test_refits_send_gram_matrices_and_where_ranks_solve_together_products_with_them(model):
    slow, slower = (replace(GPUS, link=GPUS.link / factor) for factor in (1e4, 2e4))

    def sent(method, **settings):
        _, plan = published_plan([model], [method], GPUS, **settings)
        times, stage = StageTimes(plan, checkpointing=False), first(plan, "prune")
        took = [times.of(stage, None, gpus, gpus).seconds for gpus in (slow, slower)]
        return (took[1] - took[0]) * 8 / 7 * NETWORK / (1 / slower.link - 1 / slow.link)

    sums = 32 * 2 * 2 * 8 * packed(11008)
    assert sent("surgeon-uniform") == pytest.approx(sums)
    # The vectors that it sums over are longer than half of the neurons and shorter than all, and so are products.
    block, products = sent("surgeon-uniform-block"), 32 * 2 * 8 * 4096 * 11008
    steps = 8 * 3 * products  # four iterations, then two, and both steps' right sides; of three matrices
    assert 0.5 * (sums + products) < block - 0.7 * steps < 2 * (sums + products) + 0.3 * steps
    more = sent("surgeon-uniform-block", prune__refit_iterations=12) - block
    assert 0.6 * (10 / 8) * steps < more < (10 / 8) * steps


@given(samples=st.integers(1, 400), ranks=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_ranks_wait_for_the_one_with_most_windows(model, samples, ranks):
    """Giving every rank a whole number of windows takes as long as giving some of them one window less."""
    gpus = replace(GPUS, per_node=ranks)
    whole = -(-samples // ranks) * ranks
    one_by_one = {"calibration__shard_size": 1, "importance__dtype": "bfloat16"}
    few, many = (
        of_importance(model, "hfprune", gpus, calibration__samples=it, **one_by_one) for it in (samples, whole)
    )
    assert few == pytest.approx(many)


def test_a_rate_that_is_not_known_and_gpus_that_are_not_there_are_named(model):
    _, plan = published_plan([model], ["hfprune"], GPUS)
    times, stage = StageTimes(plan, checkpointing=False), first(plan, "importance")
    job = importance_job(stage.params, checkpointing=False)
    slow = replace(GPUS, flops=None)
    assert times.of(stage, job, slow, slow).missing == "all of it: the profile has no gpu_tflops"
    assert times.of(stage, None, None, None).missing == "all of it: it has no GPUs in the profile"
    copies = times.of(first(plan, "prune"), None, None, None)
    assert (copies.gpus, copies.missing) == (0, "") and copies.seconds > START_S


def test_copies_lengthen_the_passes_of_a_refit_and_send_no_more(model):
    gpus = replace(GPUS, nodes=2, network=100e9 / 8)
    loads = []
    for copies in (0, 15):
        _, plan = published_plan([model], ["surgeon-uniform"], gpus, prune__refit_copies=copies)
        load = StageTimes(plan, checkpointing=False)._layer_pass(first(plan, "prune"), gpus)
        assert load is not None
        loads.append(load)
    assert loads[0].exchanged == pytest.approx(loads[1].exchanged) != 0
    assert loads[1].overlapping.longest > 8 * loads[0].overlapping.longest


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_a_checkpoint_is_read_and_written_in_the_bytes_that_it_has(model, monkeypatch, itemsize):
    _, plan = published_plan([model], ["hfprune"], GPUS)
    dense = replace(model.checkpoint, bytes_on_disk=itemsize * model.checkpoint.parameters)
    monkeypatch.setattr(ExpectedManifests, "dense", lambda *_: dense)
    took = StageTimes(plan, checkpointing=False).of(first(plan, "prune"), None, None, None).seconds
    assert took == pytest.approx(START_S + 2 * dense.bytes_on_disk * (1 / DISK + 1 / HASHING))
