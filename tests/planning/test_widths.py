import pytest

from hfprune_dist.errors import UserError
from hfprune_dist.planning.widths import ModelSize, Target

SMOLLM2 = ModelSize(134_515_008, (1536,) * 30, 3 * 576, "neurons")
LLAMA_3_2_1B = ModelSize(1_235_814_400, (8192,) * 16, 3 * 2048, "neurons")


def test_twenty_percent_of_smollm2_keeps_1017_neurons():
    assert Target(SMOLLM2, 0.2, 1, "m").uniform_width() == 1017


def test_twenty_percent_of_llama_1b_is_31_percent_of_its_mlp():
    width = Target(LLAMA_3_2_1B, 0.2, 1, "m").uniform_width()
    assert 1 - width / 8192 == pytest.approx(0.307, abs=0.001)
    assert LLAMA_3_2_1B.reached([width] * 16) == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("multiple_of", [8, 64, 128])
def test_rounding_to_the_nearest_multiple(multiple_of):
    width = Target(SMOLLM2, 0.3, multiple_of, "m").uniform_width()
    exact = Target(SMOLLM2, 0.3, 1, "m").uniform_width()
    assert width % multiple_of == 0 and abs(width - exact) <= multiple_of / 2 + 1


def test_out_of_reach_names_the_largest_ratio_that_is_not():
    with pytest.raises(UserError) as caught:
        Target(SMOLLM2, 0.7, 1, "model 'llama'").uniform_width()
    message = str(caught.value)
    assert "llama" in message and "0.5915" in message
    assert Target(SMOLLM2, 0.5915, 1, "m").uniform_width() == 1


def test_floors_are_rounded_up_to_multiples_but_never_beyond_a_layers_units():
    size = ModelSize(10_000, (100, 100, 10, 100), 3, "neurons")
    assert Target(size, 0.1, 8, "m").narrowest_widths(0.3, 0, 1) == [32, 32, 8, 100]
    assert Target(size, 0.1, 1, "m").narrowest_widths(0.0, 1, 0) == [100, 1, 1, 1]
    assert Target(size, 0.1, 16, "m").narrowest_widths(0.32, 0, 0) == [32, 32, 10, 32]


def test_rounding_that_removes_nothing_is_refused():
    with pytest.raises(UserError, match="removes nothing"):
        Target(SMOLLM2, 0.001, 128, "m").uniform_width()
