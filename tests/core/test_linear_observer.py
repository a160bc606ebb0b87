"""Inputs and gradients observed at linear layers give the gradients of their weights, as float64 autograd has them."""

import contextlib
import copy

import pytest
import torch
from core_definition import ROWS, cross_entropy
from tiny import FAMILY, VARIANTS, tiny_model

from hfprune_dist.core.bound_losses import Batch
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.linear_observer import SeenLinear
from hfprune_dist.core.score_batch import ScoredModel, UnitSums, score_batch
from hfprune_dist.core.unit_outputs import UnitOutputs
from hfprune_dist.core.unit_sums import NonFiniteError
from hfprune_dist.models.memory_efficient_backward import (
    checkpoint_activations,
    keep_no_gathered_weights,
    use_memory_efficient_backward,
)

NAMES = [name for output, rows in ROWS.items() for name in (*rows, output)]
OTHERS = ["entropy", "cross_entropy", "surgeon", "activation"]


def some_windows(count=3, tokens=16):
    return torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(1))


def gradients_of(model, windows, criteria=("weight_taylor",), names=NAMES, prepare=(use_memory_efficient_backward,)):
    """(layer, name) -> sum over windows of dL/dW, where L is a window's mean cross-entropy; and all sums of units."""
    model, family = model.requires_grad_(False), FAMILY
    for change in prepare:
        change(model, family)
    head, layers = family.head_of(model), model.model.layers
    gradients = {}

    def seeing(key):
        def see(inputs_BTI, gradients_BTO):
            assert inputs_BTI.dim() == gradients_BTO.dim() == 3
            gradients[key] = gradients.get(key, 0) + gradients_BTO.flatten(0, 1).T @ inputs_BTI.flatten(0, 1)

        return see

    structures = family.structures(model.config.to_dict())
    some = UnitOutputs(structures["neurons"].outputs_of(model), 1)
    scored = ScoredModel(
        body=lambda input_ids: family.body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state,
        head=lambda: contextlib.nullcontext((head.weight, head.bias)),
        outputs={"neurons": some},
        student={"neurons": [torch.arange(48) % 10 != 0 for _ in layers]},
    )
    seen = [
        SeenLinear(layer.get_submodule(name), seeing((number, name)))
        for number, layer in enumerate(layers)
        for name in names
    ]
    sums = UnitSums(scored.outputs, [CRITERIA[name] for name in criteria], None, seen)
    for number, window in enumerate(windows):
        score_batch(scored, Batch(window[None], range(number, number + 1), head.out_features, 0), sums)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer.get_submodule(name)._forward_hooks for layer in layers for name in NAMES)
    return gradients, sums.kinds["neurons"].exact


def as_defined(model, windows):
    model = copy.deepcopy(model).double().requires_grad_()
    for window in windows:
        cross_entropy(model(input_ids=window[None]).logits[0], window).backward()
    layers = model.model.layers
    return {(number, it): layer.get_submodule(it).weight.grad for number, layer in enumerate(layers) for it in NAMES}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_autograd_in_every_family(variant):
    model, windows = tiny_model(variant), some_windows()
    found, _ = gradients_of(copy.deepcopy(model), windows)
    expected = as_defined(model, windows)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() < 1e-4 * gradient.norm(), key


def frozen(model, _family):
    keep_no_gathered_weights(model)


def checkpointed(model, family):
    use_memory_efficient_backward(model, family)
    frozen(model, family)
    checkpoint_activations(model, family)


@pytest.mark.parametrize("prepare", [(), (use_memory_efficient_backward, frozen), (checkpointed,)])
@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu"}])
def test_other_backwards_and_criteria_beside_change_no_bits(prepare, options):
    model, windows = tiny_model(num_hidden_layers=3, **options), some_windows()
    alone, _ = gradients_of(copy.deepcopy(model), windows)
    beside, sums = gradients_of(copy.deepcopy(model), windows, ("weight_taylor", *OTHERS), prepare=prepare)
    _, expected = gradients_of(copy.deepcopy(model), windows, OTHERS, prepare=prepare)
    # Without our own backward, that of norms and gated products is torch's.
    same = torch.equal if prepare else (lambda one, other: torch.allclose(one, other, rtol=1e-4, atol=1e-6))
    assert beside.keys() == alone.keys() and all(same(beside[key], it) for key, it in alone.items())
    assert sums.keys() == expected.keys() and all(torch.equal(sums[name], it) for name, it in expected.items())


def test_linears_are_only_seen_where_a_criterion_needs_it():
    found, _ = gradients_of(tiny_model(), some_windows(), ["entropy", "cross_entropy"])
    assert not found


def test_gradients_of_neurons_have_the_same_bits_without_those_of_attention():
    model, windows = tiny_model("qwen3"), some_windows()
    both, _ = gradients_of(copy.deepcopy(model), windows)
    alone, _ = gradients_of(copy.deepcopy(model), windows, names=[name for name in NAMES if "mlp" in name])
    assert len(alone) == 6 and all(torch.equal(both[key], it) for key, it in alone.items())


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_nan_weights_is_named_also_where_no_unit_has_a_sum(layer):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=f"activations of layer {layer} are NaN"):
        gradients_of(model, some_windows(1))
