import dataclasses
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.core import head
from hfprune_dist.core.fidelity import FidelitySums, compare_logits, compare_outputs, divergences, standard_errors
from hfprune_dist.core.head import Outputs, next_ids


def outputs(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (13, 8), (17, 8), (17,)
    return Outputs(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes))


def following():
    return next_ids(torch.randint(17, (13,), generator=torch.Generator().manual_seed(9)))


def reference(dense_NV, model_NV, next_ids_N):
    """Compute the definitions token by token, in plain Python."""
    kl = nll = agree = 0.0
    for p_row, q_row, following_id in zip(dense_NV.softmax(-1), model_NV.softmax(-1), next_ids_N.tolist(), strict=True):
        kl += sum(p * math.log(p / q) for p, q in zip(p_row.tolist(), q_row.tolist(), strict=True))
        agree += p_row.argmax().item() == q_row.argmax().item()
        nll -= math.log(q_row[following_id].item()) if following_id >= 0 else 0.0
    return kl, agree, nll


def test_sums_match_their_definitions():
    dense, model = outputs(0), outputs(1)
    logits = [o.hidden_NC @ o.weight_VC.T + o.bias_V for o in (dense, model)]
    sums = compare_outputs(dense, model, following())
    kl, agree, nll = reference(*logits, following())
    assert sums.kl == pytest.approx(kl, rel=1e-12)
    assert sums.nll == pytest.approx(nll, rel=1e-12)
    assert (sums.agree, sums.tokens, sums.predicted) == (agree, 13, 12)


@pytest.mark.parametrize("rows", [1, 4])
def test_chunks_change_nothing(monkeypatch, rows):
    whole = compare_outputs(outputs(0), outputs(1), following())
    monkeypatch.setattr(head, "CHUNK_BYTES", rows * 17 * 8)
    chunked = compare_outputs(outputs(0), outputs(1), following())
    assert chunked.kl == pytest.approx(whole.kl, rel=1e-12)
    assert chunked.nll == pytest.approx(whole.nll, rel=1e-12)
    assert (chunked.agree, chunked.tokens, chunked.predicted) == (whole.agree, whole.tokens, whole.predicted)


@pytest.mark.parametrize(("rows", "count"), [(4, 3), (100, 0)])
def test_several_models_diverge_as_each_does_alone(monkeypatch, rows, count):
    """Bit for bit, while the dense model's logits are computed only once."""
    monkeypatch.setattr(head, "CHUNK_BYTES", rows * 17 * 8)
    models = [outputs(seed) for seed in range(1, 1 + count)]
    alone = [compare_outputs(outputs(0), model, following()).kl for model in models]
    made = []
    chunks = Outputs.logits
    monkeypatch.setattr(Outputs, "logits", lambda self: (made.append(self) or chunk for chunk in chunks(self)))
    assert divergences(outputs(0), models) == alone
    of_dense = -(-13 // rows)
    assert len(made) == of_dense * (1 + count), "a chunk of each model, once"


@pytest.mark.parametrize("has_bias", [True, False])
def test_bfloat16_rounds_weights_and_states_but_no_logits(has_bias):
    """Rounded logits would differ from those of the same numbers in float32: KL 4e-4, agreement .98."""
    generator = torch.Generator().manual_seed(0)
    shapes = (300, 64), (5000, 64), (5000,)
    rounded = [torch.randn(*shape, generator=generator).bfloat16() for shape in shapes]
    model, same = (Outputs(h, w, b if has_bias else None) for h, w, b in (rounded, [part.float() for part in rounded]))
    ids_N = torch.full((300,), -1)
    for pair in ((model, same), (same, model), (model, model)):
        sums = compare_outputs(*pair, ids_N)
        assert sums.agree == 300 and abs(sums.kl) < 300 * 1e-7
    assert divergences(model, [model]) == [0.0]


@pytest.mark.parametrize("masked", [[0], [16], [0, 3, 4, 16]])
def test_words_that_are_impossible_in_both_models_change_nothing(masked):
    def both(value):
        for model in (outputs(0), outputs(1)):
            yield dataclasses.replace(model, bias_V=model.bias_V.index_fill(0, torch.tensor(masked), value))

    dense, model, *low = *both(-torch.inf), *both(-1e4)
    ids_N = torch.full((13,), -1)
    found, expected = compare_outputs(dense, model, ids_N), compare_outputs(*low, ids_N)
    assert found.kl == pytest.approx(expected.kl, rel=1e-12) and found.agree == expected.agree
    assert divergences(dense, [model]) == [found.kl]
    only_model = compare_outputs(outputs(0), model, ids_N)
    assert only_model.kl == math.inf, "a word that the dense model may say"


def test_certain_wrong_models_are_infinitely_far_not_nan():
    dense_NV = torch.tensor([[0.0, 1000.0]])
    model_NV = torch.tensor([[5000.0, 0.0]])
    sums = compare_logits(dense_NV, model_NV, torch.tensor([1]))
    assert sums.kl == pytest.approx(5000.0)
    assert sums.means()["perplexity"] == math.inf


@settings(max_examples=30)
@given(
    windows=st.lists(st.tuples(st.floats(0, 50), st.integers(0, 8), st.floats(0, 50)), min_size=2, max_size=9),
    padding=st.integers(0, 3),
)
def test_errors_are_those_of_a_mean_over_windows(windows, padding):
    """Windows of equal length have the textbook's error; windows without a token affect only the number of windows."""
    sums = [FidelitySums(kl, agree, nll, 8, 7) for kl, agree, nll in windows]
    errors, count = standard_errors(sums), len(sums)
    textbook = {name: statistics.stdev(values) / count**0.5 for name, values in means_of(sums).items()}
    assert errors["kl_stderr"] == pytest.approx(textbook["kl"], abs=1e-12)
    assert errors["top1_agreement_stderr"] == pytest.approx(textbook["agree"], abs=1e-12)
    perplexity = sum(sums, FidelitySums()).means()["perplexity"]
    assert errors["perplexity_stderr"] == pytest.approx(textbook["nll"] * perplexity, abs=1e-12)
    padded = standard_errors([*sums, *[FidelitySums()] * padding])["kl_stderr"]
    shrunk = ((count + padding) / (count + padding - 1) * (count - 1) / count) ** 0.5
    assert padded == pytest.approx(errors["kl_stderr"] * shrunk, abs=1e-12)


def means_of(sums):
    return {
        "kl": [window.kl / window.tokens for window in sums],
        "agree": [window.agree / window.tokens for window in sums],
        "nll": [window.nll / window.predicted for window in sums],
    }


@settings(max_examples=30)
@given(tokens=st.integers(1, 9), vocabulary=st.integers(2, 7), where=st.sets(st.integers(0, 62)), data=st.randoms())
def test_what_is_no_number_agrees_with_nothing(tokens, vocabulary, where, data):
    """Not even with itself: a broken model is its own reference in the dense row."""
    logits_NV = torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(data.randrange(99)))
    broken_NV = logits_NV.clone()
    for place in where:
        broken_NV.view(-1)[place % broken_NV.numel()] = float("nan")
    whole = int((~broken_NV.isnan().any(-1)).sum())
    ids_N = torch.zeros(tokens, dtype=torch.int64)
    for pair in ((broken_NV, broken_NV), (logits_NV, broken_NV), (broken_NV, logits_NV)):
        assert compare_logits(*pair, ids_N).agree == whole
    assert compare_logits(logits_NV, logits_NV, ids_N).agree == tokens
