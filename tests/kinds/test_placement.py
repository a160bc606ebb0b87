"""Where weights lie, and how many rows a LoRA training takes at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.kinds.memory import GIB, Gpus, Need, Sizes
from hfprune_dist.kinds.placement import MOST_ROWS, choose_micro_batches, chooses, place, with_micro_batches
from hfprune_dist.kinds.training import training_need

SIZES = {
    "tiny": Sizes(64, 2, 1000, 256, 128, 0, (128,), 10**6, 10**5),
    "7B": Sizes(4096, 32, 32000, 16384, 11008, 0, (11008,), 6_738_415_616, 202_383_360),
    "70B": Sizes(8192, 80, 32000, 18432, 28672, 0, (28672,), 68_976_648_192, 855_654_400),
}


@pytest.fixture(autouse=True)
def models_by_name(monkeypatch):
    monkeypatch.setattr(Sizes, "of", SIZES.__getitem__)


def training(model, rows, masks=False, **settings):
    return training_need(RecoveryConfig(**settings), SIZES[model], rows, 1024, distills=False, masks=masks)


def gpus(count=8, gib=80):
    return Gpus(count, gib * GIB)


def chosen(models, where, **recovery):
    config = SweepConfig(recovery=recovery)
    assert chooses(config)
    gpus = {} if where is None else {"recovery": where, "distillation": where}
    done = choose_micro_batches(config, models, gpus)
    assert not chooses(done)
    return done.recovery.rows_at_once


def test_7b_on_80_gib_takes_at_least_four_rows_with_whole_weights():
    for count in (1, 2, 4, 8):
        rows = chosen(["7B"], gpus(count))
        assert rows >= 4
        assert place(training("7B", rows), gpus(count), "auto").whole


@pytest.mark.parametrize(("per_rank", "expected"), [(128, MOST_ROWS), (64, 64), (48, 16), (3, 1)])
def test_no_more_rows_at_once_than_divide_a_step_and_than_ever_help(per_rank, expected):
    config = SweepConfig(recovery={"batch_size": 2 * per_rank, "sequence_length": 8})
    assert choose_micro_batches(config, ["tiny"], {"recovery": gpus(2)}).recovery.rows_at_once == expected


@given(
    parts=st.tuples(*[st.integers(1, 100)] * 4),
    trains=st.booleans(),
    count=st.integers(1, 16),
    gib=st.integers(8, 200),
    sharding=st.sampled_from(["auto", "replicate", "zero3"]),
)
def test_weights_are_whole_wherever_they_fit_and_layers_run_again_only_where_they_must(
    parts, trains, count, gib, sharding
):
    weights, activations, temporary, gathered = parts
    need = Need(weights, activations, temporary, gathered, again=activations / 2 if trains else None)
    way = place(need, Gpus(count, gib), sharding)
    assert way.needed == need.on_each_gpu(count, whole=way.whole, checkpointing=way.checkpointing)
    assert way.fits == (way.needed <= gib)
    if way.checkpointing:
        assert trains and not (way.fits and need.on_each_gpu(count, whole=way.whole) <= gib), "not without need"
    if sharding != "auto":
        assert way.whole == (sharding == "replicate")
    elif not way.whole:
        assert need.on_each_gpu(count, whole=True, checkpointing=trains) > gib


@given(
    count=st.sampled_from([1, 2, 3, 4, 8]),
    gib=st.integers(8, 200),
    batch_size=st.sampled_from([1, 24, 32, 128]),
    models=st.sets(st.sampled_from(["7B", "70B"]), min_size=1),
)
def test_chosen_rows_can_be_shared_and_suit_every_model(count, gib, batch_size, models):
    where = gpus(count, gib)
    rows = chosen(sorted(models), where, batch_size=batch_size)
    assert rows == min(chosen([it], where, batch_size=batch_size) for it in models)
    assert rows == 1 or batch_size % (rows * count) == 0
    for model in models:
        way, one = (place(training(model, it), where, "auto") for it in (rows, 1))
        assert way.whole == one.whole, "never sharded for the sake of more rows"
        assert way.fits or rows == 1
        assert rows <= 4 or not way.checkpointing


def test_rows_leave_room_for_masks():
    """Where a method masks units while it recovers, attention's output is kept a second time."""
    config, masking = SweepConfig(recovery={"dropout": 0.0}), Method(prunes_in="recovery", allocation="local")
    fewer = 0
    for gib in range(20, 100):
        where = {"recovery": gpus(1, gib)}
        plain, masked = (
            choose_micro_batches(config, ["7B"], where, methods).recovery.rows_at_once for methods in ([], [masking])
        )
        need = training("7B", masked, masks=True, dropout=0.0)
        assert place(need, where["recovery"], "auto").fits or masked == 1
        fewer += masked < plain
    assert fewer


def test_without_gpus_it_is_what_it_was_by_default():
    assert chosen(["7B"], None) == 1 == SweepConfig().recovery.rows_at_once


def test_what_was_chosen_stays_and_what_is_set_is_not_chosen():
    now = SweepConfig(recovery={"micro_batch_size": "auto"}, distillation={"micro_batch_size": 4})
    again = with_micro_batches(now, {"recovery": 8, "distillation": 2, "calibration": 16})
    assert (again.recovery.micro_batch_size, again.distillation.micro_batch_size) == (8, 4)
