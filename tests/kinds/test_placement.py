"""Where weights lie, and how many rows a LoRA training takes at a time."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.kinds.dimensions import dimensions_of
from hfprune_dist.kinds.evaluate import Evaluate
from hfprune_dist.kinds.importance import Calibration
from hfprune_dist.kinds.memory import GIB, Gpus, fits
from hfprune_dist.kinds.placement import MOST_ROWS, choose_micro_batches, chooses, place, with_micro_batches
from hfprune_dist.kinds.training import Train

LLAMA = {"vocab_size": 32000, "num_attention_heads": 32}
MODELS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, **LLAMA},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "vocab_size": 32000,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
DIMS = {name: dimensions_of(config) for name, config in MODELS.items()}


def job(rows):
    return Train(rows, 1024, rank=32, dropout=True)


def gpus(count=8, gib=80):
    return Gpus(nodes=1, per_node=count, memory=gib * GIB)


def chosen(models, where, **recovery):
    config = SweepConfig(recovery=recovery)
    assert chooses(config)
    gpus = {} if where is None else {"recovery": where, "distillation": where}
    done = choose_micro_batches(config, [DIMS[it] for it in models], gpus)
    assert not chooses(done)
    return done.recovery.rows_at_once


def test_7b_on_80_gib_takes_at_least_four_rows_with_whole_weights():
    for count in (1, 2, 4, 8):
        rows = chosen(["7B"], gpus(count))
        assert rows >= 4
        assert place(job(rows), DIMS["7B"], gpus(count), "auto").whole


@pytest.mark.parametrize(("per_rank", "expected"), [(128, MOST_ROWS), (64, 64), (48, 16), (3, 1)])
def test_no_more_rows_at_once_than_divide_a_step_and_than_ever_help(per_rank, expected):
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000}
    config = SweepConfig(recovery={"batch_size": 2 * per_rank, "sequence_length": 8})
    dims = dimensions_of({**small, "num_attention_heads": 2})
    assert choose_micro_batches(config, [dims], {"recovery": gpus(2)}).recovery.rows_at_once == expected


@given(
    model=st.sampled_from(sorted(MODELS)),
    job=st.sampled_from([*map(job, (1, 4, 32)), Calibration(1, 1024), Calibration(8, 1024), Evaluate(8, 1024)]),
    count=st.integers(1, 16),
    gib=st.integers(8, 200),
    sharding=st.sampled_from(["auto", "replicate", "zero3"]),
)
def test_weights_are_whole_wherever_they_fit_and_layers_run_again_only_where_they_must(
    model, job, count, gib, sharding
):
    where, dims = gpus(count, gib), DIMS[model]
    way = place(job, dims, where, sharding)
    placed, copy = way.of(job, where)
    assert way.fits == fits(placed, dims, copy) and copy.ranks == (1 if way.whole else count)
    if way.checkpointing:
        assert isinstance(job, Train) and not (way.fits and fits(job, dims, copy)), "no layer runs again without need"
    if sharding != "auto":
        assert way.whole == (sharding == "replicate")
    elif not way.whole:
        assert not fits(replace(job, checkpointing=isinstance(job, Train)), dims, gpus(1, gib))


@given(
    count=st.sampled_from([1, 2, 3, 4, 8]),
    gib=st.integers(8, 200),
    batch_size=st.sampled_from([1, 24, 32, 128]),
    models=st.sets(st.sampled_from(sorted(MODELS)), min_size=1),
)
def test_chosen_rows_can_be_shared_and_suit_every_model(count, gib, batch_size, models):
    where = gpus(count, gib)
    rows = chosen(sorted(models), where, batch_size=batch_size)
    assert rows == min(chosen([it], where, batch_size=batch_size) for it in models)
    assert rows == 1 or batch_size % (rows * count) == 0
    for model in models:
        way, one = (place(job(it), DIMS[model], where, "auto") for it in (rows, 1))
        assert way.whole == one.whole, "never sharded for the sake of more rows"
        assert way.fits or rows == 1
        assert rows <= 4 or not way.checkpointing


def test_rows_leave_room_for_masks():
    """Where a method masks units while it recovers, attention's output is kept a second time (see ``Train``)."""
    config = SweepConfig(recovery={"dropout": 0.0})
    masking = Method(prunes_in="recovery", allocation="local")
    fewer = 0
    for gib in range(20, 100):
        where = gpus(1, gib)
        plain, masked = (
            choose_micro_batches(config, [DIMS["7B"]], {"recovery": where}, methods).recovery.rows_at_once
            for methods in ([], [masking])
        )
        at_once = Train.of(
            config.recovery.model_copy(update={"micro_batch_size": masked}), 1024, distills=False, masks=True
        )
        assert place(at_once, DIMS["7B"], where, "auto").fits or masked == 1
        fewer += masked < plain
    assert fewer


def test_without_gpus_it_is_what_it_was_by_default():
    assert chosen(["7B"], None) == 1 == SweepConfig().recovery.rows_at_once


def test_what_was_chosen_stays_and_what_is_set_is_not_chosen():
    now = SweepConfig(recovery={"micro_batch_size": "auto"}, distillation={"micro_batch_size": 4})
    again = with_micro_batches(now, {"recovery": 8, "distillation": 2, "calibration": 16})
    assert (again.recovery.micro_batch_size, again.distillation.micro_batch_size) == (8, 4)
