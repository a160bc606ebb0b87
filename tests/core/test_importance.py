"""Scores against the definition: float64 autograd through the whole model, per window."""

import pytest
import torch
from core_definition import definition
from tiny import VARIANTS, tiny_model

from hfprune_dist.core.entropy import entropy_gradient
from hfprune_dist.core.head import head_gradient
from hfprune_dist.core.importance import NonFiniteError, TaylorScores
from hfprune_dist.models.families import FAMILIES


def ours(model, windows, micro_batch_size):
    model = model.requires_grad_(False)
    family = FAMILIES[model.config.model_type]
    taylor = TaylorScores(family.down_projections(model), model.config.intermediate_size)
    head = family.head_of(model)
    for batch in windows.split(micro_batch_size):
        with taylor.observe():
            hidden = family.body_of(model)(input_ids=batch, use_cache=False).last_hidden_state
            _, gradient = head_gradient(hidden.detach().flatten(0, 1), head.weight, head.bias, entropy_gradient)
            hidden.backward(gradient.view_as(hidden) / batch.shape[1])
    return taylor.scores_LD


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_match_the_definition(variant, micro_batch_size):
    model = tiny_model(variant)
    windows = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(1))
    expected = definition(model, windows)
    scores = ours(model, windows, micro_batch_size)
    assert scores.dtype == torch.float64 and (expected > 0).all()
    assert ((scores - expected).abs() / expected).max() < 1e-4  # a single small score may cancel; the bulk does not
    assert torch.linalg.norm(scores - expected) / torch.linalg.norm(expected) < 1e-5


def test_no_parameter_receives_a_gradient():
    model = tiny_model()
    ours(model, torch.randint(3, 250, (2, 16)), 1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_gone_afterwards():
    model = tiny_model()
    ours(model, torch.randint(3, 250, (1, 16)), 1)
    assert not any(layer.mlp.down_proj._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_nan_weights_is_named(layer):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=f"layer {layer} "):
        ours(model, torch.randint(3, 250, (1, 16)), 1)


def test_lost_gradients_name_the_last_layer_that_has_them_not():
    model = tiny_model().requires_grad_(False)
    family = FAMILIES["llama"]
    taylor = TaylorScores(family.down_projections(model), model.config.intermediate_size)
    with pytest.raises(NonFiniteError, match="gradients of layer 1 "), taylor.observe():
        hidden = family.body_of(model)(input_ids=torch.randint(3, 250, (1, 16))).last_hidden_state
        hidden.backward(torch.full_like(hidden, float("nan")))
    assert not taylor.scores_LD.any()
