"""Products of neurons' weights and their gradients, compared with autograd through models that are really cut."""

import pytest
from core_definition import coupled_taylor
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_model import NEURONS, TEACHING, a_student, some_windows, sums_of
from tiny import tiny_model

OF_LABELS, DISTILLED = "coupled_taylor", "coupled_taylor_distilled"


def assert_close(found, expected):
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("variant", "at_once"), [("llama-tied-biases", 2), ("qwen3", 1)])
def test_scores_are_those_of_autograd(variant, at_once):
    model, windows = tiny_model(variant), some_windows(3, 16)
    found = sums_of(model, windows, [OF_LABELS, DISTILLED], at_once)[NEURONS].of_units
    assert_close(found[OF_LABELS], coupled_taylor(model, windows))
    assert_close(found[DISTILLED], coupled_taylor(model, windows, a_student(model), *TEACHING))
    assert not found[DISTILLED][~a_student(model)].any(), "of what a student lacks"


@settings(max_examples=10)
@given(
    share=st.sampled_from((0.0, 0.42, 1.0)),
    temperature=st.floats(0.1, 3),
    tokens=st.integers(2, 9),
    width=st.integers(2, 30),
)
def test_labels_and_teacher_count_as_they_are_told_to(share, temperature, tokens, width):
    model, windows = tiny_model("llama", intermediate_size=width), some_windows(2, tokens)
    found = sums_of(model, windows, [DISTILLED], 2, teaching=(share, temperature))[NEURONS].of_units
    assert_close(found[DISTILLED], coupled_taylor(model, windows, a_student(model), share, temperature))
