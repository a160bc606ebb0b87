import pytest
from blank import blank

from hfprune_dist.errors import UserError
from hfprune_dist.planning.widths import ModelSize, Target, round_down, size_of

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


def test_what_is_to_be_removed_is_as_close_as_units_allow_and_no_more_than_floors_do():
    size = ModelSize(10_000, (100, 100), 3, "neurons")
    target = Target(size, 0.03, 1, "m")
    assert (size.units, size.num_layers, size.reached([50, 100])) == (100, 2, 0.015)
    assert target.removals([50, 50]) == 100 == size.removed([50, 50])
    with pytest.raises(UserError, match=r"largest possible is 0.0297$"):
        target.removals([50, 51])
    # The last step of 100 in steps of 48 removes 4: a ratio that removes 2 is rounded to it, and one of 1 to nothing.
    assert Target(size, 0.0006, 48, "m").removals([1, 1]) == 2
    with pytest.raises(UserError, match="removes nothing"):
        Target(size, 0.0003, 48, "m").removals([1, 1])
    with pytest.raises(UserError, match=r"removes nothing once widths are rounded; use a larger ratio$"):
        Target(size, 0.0001, 1, "m").removals([1, 1])
    even = ModelSize(10_000, (96, 96), 3, "neurons")
    assert Target(even, 0.0075, 48, "m").removals([1, 1]) == 25
    with pytest.raises(UserError, match="removes nothing"):
        Target(even, 0.0069, 48, "m").removals([1, 1])


def test_a_checkpoint_has_these_numbers():
    checkpoint = blank("llama", intermediate_size=40, num_hidden_layers=3)
    assert size_of(checkpoint) == ModelSize(checkpoint.parameters, (40,) * 3, checkpoint.parameters_per_unit, "neurons")
    assert (round_down(0.12349), round_down(0.5), round_down(0.99999)) == (0.1234, 0.5, 0.9999)


def test_rounding_that_removes_nothing_is_refused():
    with pytest.raises(UserError, match="removes nothing"):
        Target(SMOLLM2, 0.001, 128, "m").uniform_width()
