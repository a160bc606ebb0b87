"""Times of a micro-batch: their components, and how they change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from hfprune_dist.checkpoints.families import FAMILIES
from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.planning import rates
from hfprune_dist.planning.dimensions import dimensions_of
from hfprune_dist.planning.evaluation_footprint import Evaluate
from hfprune_dist.planning.gpu_needs import Gpus
from hfprune_dist.planning.importance_footprint import Importance
from hfprune_dist.planning.operations import Operations
from hfprune_dist.planning.timing import precise_seconds, seconds
from hfprune_dist.planning.training_footprint import Train

GIB = 2**30
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
DIMS = dimensions_of(LLAMA_7B | {"vocab_size": 32000})
JOBS = [Importance(1, 1024), Train(1, 1024, 32, True), Evaluate(1, 1024), Importance(2, 512, itemsize=4)]
GPUS = st.builds(
    Gpus,
    nodes=st.integers(1, 5),
    per_node=st.integers(1, 8),
    memory=st.just(80.0 * GIB),
    flops=st.floats(1e12, 1e15),
    network=st.none() | st.floats(1e8, 1e11),
    link=st.floats(1e9, 1e12),
)


def faster(gpus, **times):
    changed = {name: getattr(gpus, name) and getattr(gpus, name) * by for name, by in times.items()}
    return Gpus(**{**vars(gpus), **changed})


@given(gpus=GPUS, by=st.floats(1, 100), job=st.sampled_from(JOBS))
def test_nothing_takes_longer_on_faster_machines(gpus, by, job):
    now = seconds(job, DIMS, gpus)
    for name in ("flops", "network", "link"):
        then = seconds(job, DIMS, faster(gpus, **{name: by}))
        assert then.longest <= now.longest
        assert then.network <= now.network and then.compute <= now.compute
    assert seconds(job, DIMS, faster(gpus, flops=by)).compute == pytest.approx(now.compute / by)


@given(gpus=GPUS, rows=st.integers(2, 64), job=st.sampled_from(JOBS))
def test_more_rows_are_more_work_and_no_more_gathers_or_calls(gpus, rows, job):
    one, many = seconds(job.resized(1), DIMS, gpus), seconds(job.resized(rows), DIMS, gpus)
    assert many.compute == pytest.approx(rows * one.compute)
    assert (many.network, many.launch) == (one.network, one.launch)


@given(gpus=GPUS, job=st.sampled_from(JOBS))
def test_ranks_gather_over_the_slowest_link_and_one_rank_gathers_nothing(gpus, job):
    alone = Gpus(1, 1, gpus.memory, gpus.flops, gpus.network, gpus.link)
    assert seconds(job, DIMS, alone).network == 0.0
    one_node = Gpus(1, 8, gpus.memory, gpus.flops, gpus.network, gpus.link)
    on_one = seconds(job, DIMS, one_node)
    whole = job.work(DIMS).gathered_bytes
    assert on_one.network == pytest.approx(whole * 7 / 8 / (rates.NETWORK * gpus.link))
    assert on_one.launch > seconds(job, DIMS, alone).launch, "starting gathers takes time as well"


def test_the_network_is_hidden_by_larger_micro_batches():
    gpus = {rate: Gpus(2, 8, 80 * GIB, flops=312e12, network=rate * 1e9 / 8, link=300e9) for rate in (100, 400)}
    one, many = Importance(windows=1, tokens=1024), Importance(windows=16, tokens=1024)
    few = seconds(one, DIMS, gpus[100])
    assert not few.is_work and few.longest == few.network, "one window does not pay for its gathers"
    assert seconds(many, DIMS, gpus[100]).is_work
    assert seconds(one, DIMS, gpus[400]).network == pytest.approx(few.network / 4)


@given(share=st.floats(0.1, 1), float32=st.floats(0, 1e18), float64=st.floats(0, 1e18))
def test_what_ranks_share_is_divided_and_what_they_repeat_is_not(share, float32, float64):
    gpus = Gpus(1, 8, 80 * GIB, flops=312e12)
    of = Operations(float32=float32, float64=float64)
    own = Operations(own_float32=float32, own_float64=float64)
    divided, repeated = (precise_seconds(it, gpus, share, share) for it in (of, own))
    assert divided == pytest.approx(share * repeated)
    assert precise_seconds(of + own, gpus, 1, 1) == pytest.approx(2 * repeated)


@pytest.mark.parametrize("lora", [False, True])
def test_modules_of_a_layer_are_counted_as_a_model_calls_them(lora):
    """A model calls modules with weights, and dropouts; of these, ZeRO-3 gathers those with weights."""
    model = tiny_model("llama")
    if lora:
        targets = lora_targets(FAMILIES["llama"])
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=targets)).train()
    called, gathered = [], []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    for module in layer.modules():
        has_weights = any(True for _ in module.parameters(recurse=False))
        if has_weights or isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_: called.append(1))
        if has_weights:
            module.register_forward_hook(lambda *_: gathered.append(1))
    model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    expected = (rates.LORA_MODULES, rates.GATHERED_LORA_MODULES) if lora else (rates.MODULES, rates.GATHERED_MODULES)
    assert (len(called), len(gathered)) == expected
