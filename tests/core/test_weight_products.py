"""Products of units' weights and their gradients, compared with autograd through models that are really cut."""

import contextlib
import copy

import pytest
import torch
from core_definition import coupled_taylor
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_bytes import PeakBytes
from tiny import FAMILY, VARIANTS, tiny_model
from unit_outputs import unit_outputs

from hfprune_dist.core import blocks
from hfprune_dist.core.bound_losses import Batch, TeacherSettings
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.score_batch import ScoredModel, UnitSums, score_batch
from hfprune_dist.core.unit_outputs import InputProjection
from hfprune_dist.core.unit_sums import NonFiniteError
from hfprune_dist.core.weight_products import CoupledProducts
from hfprune_dist.models.memory_efficient_backward import (
    checkpoint_activations,
    keep_no_gathered_weights,
    use_memory_efficient_backward,
)

OF_LABELS, DISTILLED = "coupled_taylor", "coupled_taylor_distilled"
OTHERS = ["entropy", "cross_entropy", "surgeon", "weight_taylor", "activation"]
GROUPS, NEURONS = "kv_groups", "neurons"


def some_windows(count=3, tokens=16):
    return torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(1))


def a_student(model):
    """Return a student without every tenth neuron, different ones in each layer."""
    numbers = torch.arange(model.config.intermediate_size)
    return torch.stack([(numbers + layer) % 10 != 0 for layer in range(model.config.num_hidden_layers)])


def outputs_of(model, kinds):
    structures = FAMILY.structures(model.config.to_dict())
    return {kind: unit_outputs(structures[kind], model) for kind in kinds}


def sums_of(model, windows, names, *, at_once=1, prepare=(use_memory_efficient_backward,), kinds=(NEURONS,), teaching):
    """Return sums of each kind: kind -> criterion -> float64 [layers, units]."""
    model, family = copy.deepcopy(model).requires_grad_(False), FAMILY
    for change in prepare:
        change(model, family)
    head = family.head_of(model)
    scored = ScoredModel(
        body=lambda input_ids: family.body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state,
        head=lambda: contextlib.nullcontext((head.weight, head.bias)),
        outputs=outputs_of(model, kinds),
        student={NEURONS: list(a_student(model))},
    )
    sums = UnitSums(scored.outputs, [CRITERIA[name] for name in names])
    for start in range(0, len(windows), at_once):
        input_ids = windows[start : start + at_once]
        numbers = range(start, start + len(input_ids))
        score_batch(scored, Batch(input_ids, numbers, head.out_features, 0, TeacherSettings(*teaching)), sums)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    return {kind: it.exact for kind, it in sums.kinds.items()}


def assert_close(found, expected):
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_autograd_in_every_family(variant, at_once):
    model, windows, teaching = tiny_model(variant), some_windows(), (0.4, 0.2)
    found = sums_of(model, windows, [OF_LABELS, DISTILLED], at_once=at_once, teaching=teaching)[NEURONS]
    assert_close(found[OF_LABELS], coupled_taylor(model, windows))
    assert_close(found[DISTILLED], coupled_taylor(model, windows, a_student(model), *teaching))
    assert not found[DISTILLED][~a_student(model)].any(), "of what a student lacks"


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    share=st.sampled_from((0.0, 0.42, 1.0)),
    temperature=st.floats(0.1, 3),
    tokens=st.integers(2, 9),
    width=st.integers(1, 30),
)
def test_labels_and_teacher_count_as_they_are_told_to(share, temperature, tokens, width):
    model, windows = tiny_model("llama", intermediate_size=width), some_windows(2, tokens)
    if not a_student(model).any(dim=1).all():
        return
    found = sums_of(model, windows, [DISTILLED], at_once=2, teaching=(share, temperature))
    assert_close(found[NEURONS][DISTILLED], coupled_taylor(model, windows, a_student(model), share, temperature))


def frozen(model, _family):
    keep_no_gathered_weights(model)


@pytest.mark.parametrize(
    "prepare",
    [
        (),
        (use_memory_efficient_backward, frozen),
        (use_memory_efficient_backward, frozen, checkpoint_activations),
    ],
)
@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu"}])
def test_other_backwards_criteria_and_kinds_beside_change_no_bits(prepare, options):
    model, windows = tiny_model(num_hidden_layers=3, **options), some_windows()
    chosen = [OF_LABELS, DISTILLED]
    alone = sums_of(model, windows, chosen, teaching=(0.4, 0.2))[NEURONS]
    given_beside = {"prepare": prepare, "kinds": (NEURONS, GROUPS), "teaching": (0.4, 0.2)}
    beside = sums_of(model, windows, [*OTHERS, *chosen], **given_beside)
    expected = sums_of(model, windows, OTHERS, **given_beside)
    # Without our own backward, that of norms and gated products is torch's.
    same = torch.equal if prepare else (lambda one, other: torch.allclose(one, other, rtol=1e-4, atol=1e-6))
    assert all(same(beside[NEURONS][name], alone[name]) for name in chosen)
    for kind, sums in expected.items():
        assert all(torch.equal(beside[kind][name], it) for name, it in sums.items()), kind
    assert beside[GROUPS].keys() == expected[GROUPS].keys(), "coupled, KV groups have no scores"


@pytest.mark.parametrize("name", [OF_LABELS, DISTILLED])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_nan_weights_is_named(layer, name):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=f"activations of layer {layer} are NaN"):
        sums_of(model, some_windows(1), [name], teaching=(0.4, 0.2))


def test_no_weights_whole_gradient_ever_exists(monkeypatch):
    """Where portions fit into a cache; a window's inputs and gradients are given."""
    width, hidden, tokens = 600, 400, 4
    monkeypatch.setattr(blocks, "CACHE_BYTES", 2**16)
    linears = [torch.nn.Linear(hidden, width), torch.nn.Linear(hidden, width), torch.nn.Linear(width, hidden)]
    scores = []
    products = CoupledProducts([InputProjection(it) for it in linears[:2]], linears[2], width // 2, scores.append)
    shown = [(torch.randn(3, tokens, it.in_features), torch.randn(3, tokens, it.out_features)) for it in linears]
    with PeakBytes() as counted:
        for seen, pair in zip(products.seen_linears(), shown, strict=True):
            seen.see(*pair)
            seen.see_weight(seen.module.weight.detach())
    assert len(scores) == 1 and scores[0].shape == (width // 2,)
    # Weights count as well, because views of them are made meanwhile.
    assert counted.peak < 4 * width * hidden * 3.3
