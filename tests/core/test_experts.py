"""Sums of experts' neurons, compared with the definition: float64 autograd by a mask on every neuron at every token."""

import contextlib

import pytest
import torch
from core_definition import GRADIENT_CRITERIA
from families import make_model
from mixtures import COUNT, KIND, definition, experts_of, family_of

from hfprune_dist.core.head import AfterHead, Batch
from hfprune_dist.core.observers import NonFiniteError, SeenUnits, UnitSums
from hfprune_dist.core.score_batch import ScoredModel, score_batch
from hfprune_dist.methods import CRITERIA
from hfprune_dist.models.experts import see_experts
from hfprune_dist.models.memory_efficient_backward import (
    checkpoint_activations,
    keep_no_gathered_weights,
    use_memory_efficient_backward,
)

NAMES = [*GRADIENT_CRITERIA, "activation_l1"]
WINDOWS = torch.randint(3, 64, (4, 11), generator=torch.Generator().manual_seed(1))
# One for each form of experts: with a gate and up of their own, beside shared ones, and transposed with biases. The
# stage's tests have all families.
FORMS = pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe", "gpt_oss"])


def as_it_comes(_model, _family):
    pass


def lean(model, family):
    use_memory_efficient_backward(model, family)
    keep_no_gathered_weights(model)


def checkpointed(model, family):
    lean(model, family)
    checkpoint_activations(model, family)


def sums_of(model, names, micro_batch_size=2, prepare=lean):
    """Return (kind, layer, criterion) -> sum, float64 [experts * neurons]."""
    model = model.requires_grad_(False)
    prepare(model, family_of(model))
    scored = ScoredModel(
        body=lambda input_ids: model.model(input_ids=input_ids, use_cache=False).last_hidden_state,
        head=lambda: contextlib.nullcontext((model.lm_head.weight, None)),
        after=AfterHead(1 / getattr(model.config, "logits_scaling", 1.0)),
    )
    projections = enumerate(see_experts(model, family_of(model)))
    units = [SeenUnits(KIND, layer, it, experts=COUNT) for layer, it in projections if it is not None]
    sums = UnitSums(units, [CRITERIA[name] for name in names])
    for start in range(0, len(WINDOWS), micro_batch_size):
        windows = range(start, min(start + micro_batch_size, len(WINDOWS)))
        score_batch(scored, Batch(WINDOWS[start : windows.stop], windows, model.lm_head.out_features, 4), sums)
    return sums.sums


@FORMS
def test_sums_are_those_that_are_defined(model_type):
    """Also in float64, except for routers, which compute in float32 in most families; and with torch's own backward."""
    narrow, wide = sums_of(make_model(model_type), NAMES), sums_of(make_model(model_type).double(), NAMES)
    plain = sums_of(make_model(model_type), NAMES, prepare=as_it_comes)
    for name in NAMES:
        defined = "activations" if name == "activation_l1" else name
        expected = definition(make_model(model_type), WINDOWS, defined, seed=4)
        assert {layer for _, layer in expected} == {*experts_of(make_model(model_type))}
        for layer in experts_of(make_model(model_type)):
            expected_U = expected[KIND, layer]
            for found, tolerance in ((wide, 1e-6), (narrow, 1e-4), (plain, 1e-4)):
                assert (found[KIND, layer, name] - expected_U).norm() <= tolerance * expected_U.norm(), name


@pytest.mark.parametrize(("model_type", "dtype"), [("glm4_moe", torch.float32), ("gpt_oss", torch.bfloat16)])
def test_sums_have_the_same_bits_with_layers_that_run_twice(model_type, dtype):
    expected = sums_of(make_model(model_type).to(dtype), NAMES)
    found = sums_of(make_model(model_type).to(dtype), NAMES, prepare=checkpointed)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], it) for key, it in expected.items())


@pytest.mark.parametrize("which", ["gate_up_proj", "down_proj"])
def test_a_layer_with_an_expert_that_is_not_finite_is_named(which):
    model = make_model("olmoe")
    with torch.no_grad():
        getattr(model.model.layers[1].mlp.experts, which)[2, 1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1 " if which == "gate_up_proj" else "layer 2 "):
        sums_of(model, ["entropy"])
