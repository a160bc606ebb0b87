"""Lean layers, compared with unmodified models: the same bits forward, the same gradient backward."""

import copy

import pytest
import torch
from tiny import FAMILY, VARIANTS, tiny_model

from hfprune_dist.models import memory_efficient_backward as backward

WINDOWS = torch.randint(3, 200, (2, 21), generator=torch.Generator().manual_seed(0))


def run(model):
    """Return final hidden states, and a gradient at the token embeddings."""
    model = model.requires_grad_(False)
    embedded = model.model.embed_tokens(WINDOWS).requires_grad_()
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((hidden * weights).sum(), embedded)
    return hidden, gradient


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_computes_the_same(variant):
    model = tiny_model(variant)
    hidden, gradient = run(copy.deepcopy(model))
    backward.use_memory_efficient_backward(model, FAMILY)
    backward.keep_no_gathered_weights(model)
    lean_hidden, lean_gradient = run(model)
    assert torch.equal(lean_hidden, hidden)
    torch.testing.assert_close(lean_gradient, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
