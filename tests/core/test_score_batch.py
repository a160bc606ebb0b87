"""Sums, compared with the definitions: float64 autograd through the whole model, per window."""

import contextlib
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from core_definition import GRADIENT_CRITERIA, definition, label_terms, moments
from tiny import FAMILY, VARIANTS, tiny_model
from unit_outputs import unit_outputs

from hfprune_dist.core import head
from hfprune_dist.core.bound_losses import Batch
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.core.score_batch import ScoredModel, UnitSums, score_batch
from hfprune_dist.core.unit_sums import NonFiniteError
from hfprune_dist.models.memory_efficient_backward import checkpoint_activations, use_memory_efficient_backward

NEURONS, GROUPS = "neurons", "kv_groups"
BOTH = (NEURONS, GROUPS)
OF_OTHERS = {name for name, it in CRITERIA.items() if it.is_of_neurons_alone or it.is_of_whole_experts_alone}
SUMMED = [name for name, it in CRITERIA.items() if it.has_sums_of_units and name not in OF_OTHERS]


def ours(model, windows, micro_batch_size, names=("entropy",), **options):
    """Return sums of some criteria, name -> float64 [layers, neurons]."""
    return all_sums(model, windows, micro_batch_size, names, **options)[NEURONS].exact


def all_sums(model, windows, micro_batch_size, names, seed=0, prepare=use_memory_efficient_backward, kinds=(NEURONS,)):
    """Return sums of each kind and, as ``curvature``, those of g g^T at its output projections' outputs, by layer."""
    model = model.requires_grad_(False)
    family = FAMILY
    prepare(model, family)
    linear = family.head_of(model)
    scored = ScoredModel(
        body=lambda input_ids: family.body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state,
        head=lambda: contextlib.nullcontext((linear.weight, linear.bias)),
        outputs=outputs_of(model, kinds),
        student={NEURONS: a_student(model)},
    )
    curvature = {kind: defaultdict(float) for kind in kinds}

    def seeing(kind):
        def see(layer, gradients):
            curvature[kind][layer] += gram_matrix(gradients.float())

        return see

    sums = UnitSums(scored.outputs, [CRITERIA[name] for name in names], {kind: seeing(kind) for kind in kinds})
    for start in range(0, len(windows), micro_batch_size):
        input_ids = windows[start : start + micro_batch_size]
        score_batch(scored, Batch(input_ids, range(start, start + len(input_ids)), linear.out_features, seed), sums)
    return {kind: SimpleNamespace(exact=it.exact, curvature=curvature[kind]) for kind, it in sums.kinds.items()}


def outputs_of(model, kinds):
    structures = FAMILY.structures(model.config.to_dict())
    return {kind: unit_outputs(structures[kind], model) for kind in kinds}


def channels_of_groups(model):
    return outputs_of(model, [GROUPS])[GROUPS].channels_per_unit


def a_student(model):
    """Return a student without every tenth neuron, different ones in each layer."""
    numbers = torch.arange(model.config.intermediate_size)
    return torch.stack([(numbers + layer) % 10 != 0 for layer in range(model.config.num_hidden_layers)])


def some_windows(count=5, tokens=24):
    return torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_entropy_matches_the_definition_in_every_family(variant):
    model, windows = tiny_model(variant), some_windows()
    expected = definition(model, windows)
    assert (expected > 0).all()
    for micro_batch_size in (1, 3):
        scores = ours(model, windows, micro_batch_size)["entropy"]
        assert scores.dtype == torch.float64
        assert ((scores - expected).abs() / expected).max() < 1e-4  # a single small score may cancel; most don't
        assert torch.linalg.norm(scores - expected) / torch.linalg.norm(expected) < 1e-5


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_all_criteria_at_once_match_their_definitions(variant):
    model, windows = tiny_model(variant), some_windows()
    names = [name for name in GRADIENT_CRITERIA if name in SUMMED]
    scores = ours(model, windows, 3, names, seed=4)
    for name in names:
        expected = definition(model, windows, name, seed=4)
        assert (expected > 0).all(), name
        assert torch.linalg.norm(scores[name] - expected) / torch.linalg.norm(expected) < 2e-5, name


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_curvature_is_the_second_moment_of_the_gradients_at_the_mlps_outputs(variant):
    model, windows = tiny_model(variant), some_windows()
    sums = all_sums(model, windows, 2, ["entropy", "surgeon"], seed=4)[NEURONS]
    assert_moments(sums, moments(model, windows, seed=4), windows.numel())


def assert_moments(sums, expected_moments, tokens):
    for layer, (_, expected, fisher) in enumerate(expected_moments):
        found = sums.curvature[layer] / tokens
        assert torch.linalg.norm(found - expected) / torch.linalg.norm(expected) < 2e-5
        torch.testing.assert_close(sums.exact["surgeon"][layer] / tokens, fisher, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kv_groups_match_the_definitions_in_every_family(variant):
    """The sums are of o_proj's inputs, whatever biases and norms do to queries, keys and values."""
    model, windows = tiny_model(variant), some_windows()
    channels = channels_of_groups(model)
    names = [name for name in GRADIENT_CRITERIA if name in SUMMED]
    output = "self_attn.o_proj"
    expected = {name: definition(model, windows, name, 4, channels, output) for name in names}
    expected_moments = list(moments(model, windows, 4, channels, output))
    for micro_batch_size in (1, 3):
        found = all_sums(model, windows, micro_batch_size, SUMMED, seed=4, kinds=BOTH)[GROUPS]
        assert all(found.exact[name].shape == (2, 2) for name in SUMMED if not CRITERIA[name].is_of_channels)
        for name in names:
            torch.testing.assert_close(found.exact[name], expected[name], rtol=1e-3, atol=1e-9, msg=name)
        assert_moments(found, expected_moments, windows.numel())


class Counted(torch.nn.Module):
    """A wrapper that counts a module's forwards and backwards."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0

    def forward(self, **inputs):
        self.forwards += 1
        outputs = self.inner(**inputs)
        if outputs.last_hidden_state.requires_grad:
            outputs.last_hidden_state.register_hook(self._count)
        return outputs

    def _count(self, _gradient):
        self.backwards += 1


def test_any_number_of_kinds_shares_a_forward_the_logits_and_a_backward_for_each_loss(monkeypatch):
    """A student needs one more of each; entropy's two criteria share one backward, as do those of random signs."""
    calls = []

    def counted(*given, **options):
        calls.append(0)
        return head.head_gradients(*given, **options)

    monkeypatch.setattr("hfprune_dist.core.score_batch.head_gradients", counted)
    for kinds in ([NEURONS], BOTH):
        calls.clear()
        model = tiny_model()
        model.model = Counted(model.model)
        model.model.layers, model.model.norm = model.model.inner.layers, model.model.inner.norm
        names = ["entropy", "fisher_signs", "surgeon", "activation"]
        all_sums(model, some_windows(2), 2, names, kinds=kinds)
        assert (model.model.forwards, len(calls), model.model.backwards) == (1, 1, 2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_neurons_have_the_same_bits_where_groups_are_scored_beside_them(variant, dtype, checkpointing):
    names = [name for name, it in CRITERIA.items() if it.summed != "nothing" and it.student_of is None]

    def prepare(model, family):
        use_memory_efficient_backward(model, family)
        if checkpointing:
            checkpoint_activations(model, family)

    alone, beside = (
        all_sums(tiny_model(variant).to(dtype), some_windows(3), 2, names, prepare=prepare, kinds=kinds)
        for kinds in ([NEURONS], BOTH)
    )
    assert_same_bits(beside[NEURONS], alone[NEURONS])


def assert_same_bits(sums, expected):
    assert sums.exact.keys() == expected.exact.keys()
    assert all(torch.equal(sums.exact[name], it) for name, it in expected.exact.items())
    assert sums.curvature.keys() == expected.curvature.keys() and len(sums.curvature) > 1
    assert all(torch.equal(sums.curvature[layer], it) for layer, it in expected.curvature.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["llama-tied-biases", "qwen3"])
def test_several_criteria_at_once_have_the_bits_of_each_alone(variant, dtype):
    model, windows = tiny_model(variant).to(dtype), some_windows()
    together = ours(model, windows, 2, SUMMED)
    for name in SUMMED:
        assert torch.equal(together[name], ours(model, windows, 2, [name])[name]), name


def test_neither_chunks_nor_micro_batches_change_what_is_drawn(monkeypatch):
    model, windows = tiny_model().double(), some_windows()
    names = ["fisher", "fisher_signs"]
    expected = ours(model, windows, 5, names)
    monkeypatch.setattr(head, "CHUNK_BYTES", 7 * model.config.vocab_size * 8)
    for name, scores in ours(model, windows, 2, names).items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-5, atol=0.0)


def test_another_seed_draws_other_labels_and_signs():
    model, windows = tiny_model(), some_windows(1)
    names = ["entropy", "fisher", "fisher_signs"]
    first, second = ours(model, windows, 1, names, seed=0), ours(model, windows, 1, names, seed=1)
    assert torch.equal(first["entropy"], second["entropy"])
    assert not torch.isclose(first["fisher"], second["fisher"]).any()
    assert not torch.isclose(first["fisher_signs"], second["fisher_signs"]).any()


def exact_fisher(model, window):
    """sum over tokens s and t of E[(h_s * dlog p(y_t)/dh_s)^2], with every word of the vocabulary in turn as y_t."""
    p, products = label_terms(model, window)
    return torch.stack([(p * x.square().sum(2)).sum((0, 1)) for x in products])


@pytest.mark.parametrize("name", ["fisher", "fisher_signs"])
def test_many_draws_average_to_the_exact_fisher_of_the_whole_model(name):
    """Also that effects of one token's neuron on several later tokens add up, as the criteria's comment claims."""
    model = tiny_model(vocab_size=9).double()
    window, draws, parts = torch.tensor([3, 8, 4, 7]), 1200, 12
    expected = exact_fisher(model, window)
    averages = torch.stack(
        [ours(model, window.expand(draws // parts, -1), 50, [name], seed=seed)[name] for seed in range(parts)]
    ) / (draws // parts)
    difference = averages.mean(0) - expected
    assert torch.linalg.norm(difference) / torch.linalg.norm(expected) < 0.1
    standard_error = averages.std(0) / parts**0.5
    assert (difference.abs() < 3 * standard_error).double().mean() > 0.95  # t distribution, 11 degrees of freedom


def test_activations_alone_need_no_graph():
    model, windows = tiny_model(), some_windows()
    scores = ours(model, windows, 2, ["activation"])["activation"]
    columns = torch.stack([layer.mlp.down_proj.weight for layer in model.model.layers]).double()
    expected = definition(model, windows, "activation")
    torch.testing.assert_close(scores.sqrt() * columns.norm(dim=1), expected, rtol=1e-5, atol=0.0)


def test_no_parameter_receives_a_gradient():
    model = tiny_model()
    ours(model, some_windows(2), 1, SUMMED)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_gone_afterwards():
    model = tiny_model()
    ours(model, some_windows(1), 1)
    assert not any(layer.mlp.down_proj._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize("kinds", [[NEURONS], BOTH])
@pytest.mark.parametrize("names", [["entropy"], ["activation"], SUMMED])
@pytest.mark.parametrize("where", ["mlp.up_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_nan_weights_is_named(layer, where, names, kinds):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[layer].get_submodule(where).weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=f"layer {layer} "):
        all_sums(model, some_windows(1), 1, names, kinds=kinds)


def test_squares_that_overflow_are_told_from_gradients_and_named_where_they_begin():
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[3] *= 1e25
            layer.mlp.down_proj.weight[:, 3] = 0
    with pytest.raises(NonFiniteError, match=r"^squared activations of layer 0 are"):
        all_sums(model, some_windows(1), 1, ["entropy", "activation"])


def test_lost_gradients_name_the_last_layer_that_has_them_not():
    model = tiny_model().requires_grad_(False)
    family = FAMILY
    entropy = CRITERIA["entropy"]
    sums = UnitSums(outputs_of(model, BOTH), [entropy])
    with pytest.raises(NonFiniteError, match="gradients of layer 1 "), sums.observe():
        hidden = family.body_of(model)(input_ids=some_windows(1)).last_hidden_state
        gradient = torch.full_like(hidden.detach().flatten(0, 1), float("nan"))
        sums.backward(hidden, {entropy.loss: (torch.zeros(24), gradient)})
    assert not any(sums.kinds[kind].exact["entropy"].any() for kind in BOTH)


def test_losses_are_read_after_the_last_backward(monkeypatch):
    """So that each backward can be queued while a GPU still computes the one before it."""
    events = []
    for name in ("backward", "item"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda *args, _own=own, _name=name, **options: events.append(_name) or _own(*args, **options),
        )
    all_sums(tiny_model().requires_grad_(False), some_windows(1), 1, ["entropy", "fisher"])
    assert events == ["backward", "backward", "item", "item"]


@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_activations_give_the_same_bits(dtype, options):
    windows = some_windows(3)

    def prepare(model, family):
        use_memory_efficient_backward(model, family)
        checkpoint_activations(model, family)

    plain, checkpointed = (
        all_sums(tiny_model(num_hidden_layers=3, **options).to(dtype), windows, 2, SUMMED, prepare=it, kinds=BOTH)
        for it in (use_memory_efficient_backward, prepare)
    )
    for kind in BOTH:
        assert_same_bits(checkpointed[kind], plain[kind])


def test_an_mlp_with_another_activation_is_left_as_it_is():
    model, windows = tiny_model(hidden_act="gelu"), some_windows()
    expected = definition(model, windows)
    assert torch.linalg.norm(ours(model, windows, 2)["entropy"] - expected) / torch.linalg.norm(expected) < 1e-5
