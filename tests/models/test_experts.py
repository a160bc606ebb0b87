"""Experts in view of hooks, compared with unmodified models."""

import copy

import pytest
import torch
from families import make_model
from mixtures import COUNT, LAYERS, experts_of, family_of

from hfprune_dist.errors import UserError
from hfprune_dist.models.experts import see_experts, weighted_activations

WINDOWS = torch.randint(3, 64, (2, 13), generator=torch.Generator().manual_seed(0))


def run(model):
    """Return logits, and a gradient at the token embeddings."""
    embedded = model.model.embed_tokens(WINDOWS).detach().requires_grad_()
    logits = model.requires_grad_(False)(inputs_embeds=embedded, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embedded)
    return logits, gradient


@pytest.mark.parametrize("unknown", [{"has_gate": False}, {"has_post_expert_norm": True}])
def test_experts_that_compute_something_else_are_refused(unknown):
    model = make_model("mixtral")
    vars(experts_of(model)[1]).update(unknown)
    with pytest.raises(UserError, match="MixtralExperts: experts that"):
        see_experts(model, family_of(model))
    with pytest.raises(UserError, match="MixtralExperts: experts that"):
        weighted_activations(experts_of(model)[1], torch.ones(1, 32), torch.zeros(1, 1).long(), torch.ones(1, 1))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
@torch.no_grad()
def test_what_down_projections_read_adds_up_to_what_experts_put_out(model_type):
    model, generator = make_model(model_type), torch.Generator().manual_seed(3)
    experts = next(iter(experts_of(model).values()))
    hidden_NC, weights_NK = torch.randn(7, 32, generator=generator), torch.rand(7, 2, generator=generator)
    index_NK = torch.stack([torch.randperm(COUNT - 1, generator=generator)[:2] for _ in range(7)])
    index_NK[:5] += 1  # so that some expert may have few
    expected_NC, added_NC = experts(hidden_NC, index_NK, weights_NK), torch.zeros(7, 32)
    parts = weighted_activations(experts, hidden_NC, index_NK, weights_NK)
    for expert, (part_ND, weight) in enumerate(zip(parts, experts.down_proj, strict=True)):
        weight_CD = weight.T if experts.is_transposed else weight
        tokens, places = (index_NK == expert).nonzero(as_tuple=True)
        assert part_ND.shape == (len(tokens), weight_CD.shape[1])
        added_NC[tokens] += part_ND @ weight_CD.T
        if experts.has_bias:
            added_NC[tokens] += weights_NK[tokens, places, None] * experts.down_proj_bias[expert]
    torch.testing.assert_close(added_NC, expected_NC, rtol=1e-4, atol=1e-4)


def test_a_gate_with_another_activation_is_applied_as_it_is():
    model = make_model("mixtral")
    for module in experts_of(model).values():
        module.act_fn = torch.nn.GELU()
    model.set_experts_implementation("eager")
    expected = run(copy.deepcopy(model))
    see_experts(model, family_of(model))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharded", [True, False])
def test_what_experts_read_has_a_gradient_where_their_weights_must_be_given_back(sharded):
    model = make_model("mixtral").requires_grad_(False)
    for module in experts_of(model).values():
        if sharded:
            module.down_proj.ds_shape = module.down_proj.shape
    see_experts(model, family_of(model))
    have = []
    for module in experts_of(model).values():
        module.register_forward_hook(lambda _, inputs, _output: have.append(inputs[0].requires_grad))
    logits = model(input_ids=WINDOWS).logits
    assert have == [sharded] * LAYERS and logits.requires_grad == sharded
    with torch.no_grad():
        assert torch.equal(model(input_ids=WINDOWS).logits, logits)
    assert have[LAYERS:] == [False] * LAYERS
