"""Sums, compared with the definitions: float64 autograd through the whole model, per window."""

import pytest
import torch
from core_definition import GRADIENT_CRITERIA, definition, label_terms, moments
from scored_model import BOTH, GROUPS, NEURONS, assert_same_bits, checkpointed, some_windows, sums_of, units_of
from tiny import tiny_model

from hfprune_dist.core import head
from hfprune_dist.core.observers import NonFiniteError
from hfprune_dist.methods import CRITERIA

# Criteria with sums of neurons; and those that also have sums of KV groups.
SUMMED = [name for name, criterion in CRITERIA.items() if criterion.has_sums_of(NEURONS)]
OF_BOTH = [name for name in SUMMED if CRITERIA[name].has_sums_of(GROUPS)]


def ours(model, windows, at_once, names=("entropy",), **options):
    return sums_of(model, windows, names, at_once, **options)[NEURONS].of_units


def assert_moments(sums, expected_moments, tokens):
    for layer, (gram, curvature, fisher) in enumerate(expected_moments):
        for sum_of_products, expected in ((sums.grams, gram), (sums.curvature, curvature)):
            found = sum_of_products[layer] / tokens
            assert torch.linalg.norm(found - expected) / torch.linalg.norm(expected) < 2e-5
        torch.testing.assert_close(sums.of_units["surgeon"][layer] / tokens, fisher, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("variant", ["llama-tied-biases", "qwen3"])
def test_sums_match_the_definitions(variant):
    """The sums of groups are of o_proj's inputs, whatever biases and norms do to queries, keys and values."""
    model, windows = tiny_model(variant), some_windows()
    channels = units_of(model, [GROUPS])[0].channels_per_unit
    places = {NEURONS: (1, "mlp.down_proj"), GROUPS: (channels, "self_attn.o_proj")}
    for at_once in (1, 3):
        found = sums_of(model, windows, OF_BOTH, at_once, seed=4, kinds=BOTH)
        for kind, place in places.items():
            for name in GRADIENT_CRITERIA:
                expected, scores = definition(model, windows, name, 4, *place), found[kind].of_units[name]
                assert (expected > 0).all() and scores.dtype == torch.float64
                assert torch.linalg.norm(scores - expected) < 2e-5 * torch.linalg.norm(expected), name
            assert_moments(found[kind], moments(model, windows, 4, *place), windows.numel())


@pytest.mark.parametrize(
    ("variant", "dtype", "options"),
    [("llama-tied-biases", torch.float32, {"hidden_act": "gelu"}), ("qwen3", torch.bfloat16, {})],
)
def test_neither_other_kinds_nor_criteria_nor_checkpointing_change_bits(variant, dtype, options):
    model, windows = tiny_model(variant, num_hidden_layers=3, **options).to(dtype), some_windows(3)
    together = sums_of(model, windows, SUMMED, 2, kinds=BOTH)
    again = sums_of(model, windows, SUMMED, 2, kinds=BOTH, prepare=checkpointed)
    for kind in BOTH:
        assert_same_bits(again[kind], together[kind])
    assert_same_bits(sums_of(model, windows, SUMMED, 2)[NEURONS], together[NEURONS])
    for name in SUMMED:
        assert torch.equal(together[NEURONS].of_units[name], ours(model, windows, 2, [name])[name]), name


def test_any_number_of_kinds_shares_a_forward_the_logits_and_a_backward_for_each_loss(monkeypatch):
    """Of the criteria of random signs, there are two. Losses are read only after the last backward."""
    model, calls, events = tiny_model(), [], []
    original = head.head_gradients
    monkeypatch.setattr(
        "hfprune_dist.core.score_batch.head_gradients", lambda *given, **kw: calls.append(0) or original(*given, **kw)
    )
    for place, name in ((type(model.model), "forward"), (torch.Tensor, "backward"), (torch.Tensor, "tolist")):
        own = getattr(place, name)
        monkeypatch.setattr(
            place, name, lambda *args, _own=own, _name=name, **kw: events.append(_name) or _own(*args, **kw)
        )
    sums_of(model, some_windows(2), ["entropy", "fisher_signs", "surgeon", "activation_l1"], 2, kinds=BOTH)
    assert events == ["forward", "backward", "backward", "tolist"] and len(calls) == 1


def test_many_draws_average_to_the_exact_fisher_of_the_whole_model():
    """Effects of a token's neuron on several later tokens add up, with every word of the vocabulary as their label."""
    model = tiny_model(vocab_size=9).double()
    window, draws, parts = torch.tensor([3, 8, 4, 7]), 960, 12
    p, products = label_terms(model, window)
    expected = torch.stack([(p * x.square().sum(2)).sum((0, 1)) for x in products])
    some, name = window.expand(draws // parts, -1), "fisher_signs"
    averages = torch.stack([ours(model, some, 50, [name], seed=seed)[name] for seed in range(parts)])
    averages /= draws // parts
    difference = averages.mean(0) - expected
    assert torch.linalg.norm(difference) / torch.linalg.norm(expected) < 0.1
    standard_error = averages.std(0) / parts**0.5
    assert (difference.abs() < 3 * standard_error).double().mean() > 0.95  # t distribution, 11 degrees of freedom


def test_activations_alone_need_no_graph(monkeypatch):
    model, windows, graphs = tiny_model(), some_windows(), []
    forward = type(model.model).forward

    def noted(*args, **kw):
        graphs.append(torch.is_grad_enabled())
        return forward(*args, **kw)

    monkeypatch.setattr(type(model.model), "forward", noted)
    scores = ours(model, windows, 2, ["activation_l1"])["activation_l1"]
    assert graphs == [False] * 3
    columns = torch.stack([layer.mlp.down_proj.weight for layer in model.model.layers]).double()
    expected = definition(model, windows, "activation_l1")
    torch.testing.assert_close(scores.sqrt() * columns.abs().sum(dim=1), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("names", [["entropy"], ["activation_l1"], ["weight_taylor"], ["coupled_taylor_distilled"]])
@pytest.mark.parametrize(("where", "kinds"), [("mlp.up_proj", [NEURONS]), ("self_attn.v_proj", BOTH)])
def test_a_layer_with_nan_weights_is_named(where, names, kinds):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].get_submodule(where).weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1 "):
        sums_of(model, some_windows(1), names, kinds=kinds)


def test_lost_gradients_name_the_last_layer_that_has_them_not():

    def lose_gradients(_norm, _inputs, output):
        output.register_hook(lambda gradient: gradient * torch.nan)

    model = tiny_model()
    model.model.norm.register_forward_hook(lose_gradients)
    with pytest.raises(NonFiniteError, match="gradients of layer 1 "):
        sums_of(model, some_windows(1), ["entropy"], kinds=BOTH)
