"""Second-order scores estimate the KL divergence that removing a neuron really costs: checked in exact arithmetic.

A share eps of neuron n goes at all tokens s: h_sn becomes (1 - eps) h_sn. In the mean over tokens t of
KL(p_t || q_t), the first order vanishes. The second is eps^2 / 2 times the mean over t of
E[(sum_s h_sn * dlog p(y_t)/dh_sn)^2], with labels y_t drawn from p_t.
"""

import pytest
import torch
from core_definition import label_terms
from tiny import tiny_model

WINDOW = torch.tensor([1, 8, 4, 7, 3])


@pytest.fixture(scope="module")
def model():
    """Entirely in float64: a norm of transformers would round to float32."""
    model = tiny_model(vocab_size=11).double().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, norm=module: (
                x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight
            )
    return model


@pytest.fixture(scope="module")
def terms(model):
    """p(y_t) [tokens, words, 1], and h_sn * dlog p(y_t)/dh_sn of each layer [tokens t, words, tokens s, neurons]."""
    return label_terms(model, WINDOW)


def expectation(terms, of_terms):
    """Mean over tokens t of E[of_terms(h * dlog p(y_t)/dh)] for every neuron: [layers, neurons]."""
    p, products = terms
    return torch.stack([(p * of_terms(x)).sum((0, 1)) for x in products]) / len(WINDOW)


def whole(x):
    return x.sum(2).square()


def token_by_token(x):
    return x.square().sum(2)


def measured(model, eps, at=slice(None)):
    """Mean KL divergence per token if a share eps of a neuron goes at some tokens, for every neuron in turn."""
    layers = model.model.layers
    neurons = model.config.intermediate_size
    found = torch.zeros(len(layers), neurons, dtype=torch.float64)
    with torch.no_grad():
        dense = model(input_ids=WINDOW[None]).logits.log_softmax(-1)
        for number, layer in enumerate(layers):
            # One copy of the window for each neuron, scaled down only in its copy.
            keeps = torch.ones(neurons, len(WINDOW), neurons, dtype=torch.float64)
            keeps[torch.arange(neurons), :, torch.arange(neurons)] = (~chosen(at)).double() + chosen(at) * (1 - eps)
            handle = layer.mlp.down_proj.register_forward_pre_hook(lambda _m, inputs, it=keeps: (inputs[0] * it,))
            reduced = model(input_ids=WINDOW.expand(neurons, -1)).logits.log_softmax(-1)
            handle.remove()
            found[number] = (dense.exp() * (dense - reduced)).sum(-1).mean(-1)
    return found


def chosen(at):
    tokens = torch.zeros(len(WINDOW), dtype=torch.bool)
    tokens[at] = True
    return tokens


def rank_correlation(a, b):
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def test_the_second_order_is_what_a_small_removal_costs(model, terms):
    predicted = expectation(terms, whole) / 2
    off = {eps: measured(model, eps) / (eps**2 * predicted) - 1 for eps in (2e-2, 1e-2, 5e-3)}
    assert off[1e-2].abs().max() < 0.02
    assert off[1e-2].abs().median() / off[2e-2].abs().median() == pytest.approx(0.5, rel=0.05)
    assert off[5e-3].abs().median() / off[1e-2].abs().median() == pytest.approx(0.5, rel=0.05)


def test_it_ranks_whole_removals_of_single_neurons(model, terms):
    assert rank_correlation(measured(model, 1.0), expectation(terms, whole)) > 0.99


def test_fisher_is_twice_what_removals_at_single_tokens_cost_together(model, terms):
    """As the comment above ``CRITERIA`` says."""
    eps = 1e-3
    together = sum(measured(model, eps, token) for token in range(len(WINDOW)))
    torch.testing.assert_close(2 * together / eps**2, expectation(terms, token_by_token), rtol=1e-2, atol=0.0)


def test_fisher_leaves_out_what_one_tokens_neuron_and_anothers_do_together(model, terms):
    """None in the last layer, where a neuron reaches only its own token; before it, attention mixes tokens."""
    (first, last), (whole_first, whole_last) = expectation(terms, token_by_token), expectation(terms, whole)
    torch.testing.assert_close(last, whole_last)
    assert (first / whole_first - 1).abs().max() > 0.2
    assert rank_correlation(first, whole_first) > 0.98
