"""Products of neurons' weights and their gradients, compared with autograd through models that are really cut."""

from core_definition import coupled_taylor
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_model import NEURONS, a_student, some_windows, sums_of
from tiny import tiny_model

DISTILLED = "coupled_taylor_distilled"


@settings(max_examples=10)
@given(
    share=st.sampled_from((0.0, 0.42, 1.0)),
    temperature=st.floats(0.1, 3),
    tokens=st.integers(2, 9),
    width=st.integers(2, 30),
)
def test_labels_and_teacher_count_as_they_are_told_to(share, temperature, tokens, width):
    model, windows = tiny_model("llama", intermediate_size=width), some_windows(2, tokens)
    found = sums_of(model, windows, [DISTILLED], 2, teaching=(share, temperature))[NEURONS].of_units[DISTILLED]
    expected = coupled_taylor(model, windows, a_student(model), share, temperature)
    assert (found - expected).norm() < 1e-5 * expected.norm()
