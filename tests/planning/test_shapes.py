"""The shape with one width, and bounds of layers that compete: as close to the ratio as rounding allows."""

import pytest
from blank import SMOLLM2, blank

from hfprune_dist.errors import UserError
from hfprune_dist.planning.budget import budget_of
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.shapes import uniform_shape
from hfprune_dist.planning.widths import round_down


def target(ratio, multiple_of=1, **sizes):
    return ShapeTarget(blank(**SMOLLM2 | sizes), ratio, ("neurons",), multiple_of, "model 'llama'")


def width(*asked, **sizes):
    (only,) = {*uniform_shape(target(*asked, **sizes)).units["neurons"]}
    return only


def test_twenty_percent_of_smollm2_keeps_1017_neurons():
    assert width(0.2) == 1017


@pytest.mark.parametrize("multiple_of", [8, 64, 128])
def test_rounding_to_the_nearest_multiple(multiple_of):
    assert width(0.3, multiple_of) % multiple_of == 0 and abs(width(0.3, multiple_of) - width(0.3)) <= multiple_of / 2


def test_out_of_reach_names_the_largest_ratio_that_is_not():
    with pytest.raises(UserError, match=r"model 'llama': ratio 0.7 can't be reached .* possible is 0.5915$"):
        width(0.7)
    assert width(0.5915) == 1
    with pytest.raises(UserError, match="removes nothing"):
        width(0.001, 128)


def test_floors_are_rounded_up_to_multiples_but_never_beyond_a_layers_units():
    sizes = {"intermediate_size": 100, "num_hidden_layers": 4}
    for multiple_of, limits, least in (
        (8, (0.3, 0, 1), (32, 32, 32, 100)),
        (1, (0.0, 1, 0), (100, 1, 1, 1)),
        (16, (0.32, 0, 0), (32,) * 4),
        (64, (0.3, 1, 1), (100, 64, 64, 100)),
    ):
        assert budget_of(target(1e-3, multiple_of, **sizes), limits).least["neurons"] == least


def test_what_is_to_be_removed_is_as_close_as_units_allow_and_no_more_than_floors_do():
    sizes = {"intermediate_size": 100, "num_hidden_layers": 2}
    per_unit = target(0.1, **sizes).counts.units["neurons"]
    share = per_unit / target(0.1, **sizes).counts.total
    assert budget_of(target(99.6 * share, **sizes), (0.5, 0, 0)).parameters == 100 * per_unit
    with pytest.raises(UserError, match=f"with the floors .* possible is {round_down(100 * share):.4f}"):
        budget_of(target(101 * share, **sizes), (0.5, 0, 0))
    # The last step of 100 in steps of 48 removes 4: a ratio that removes 2 is rounded to it, and one of 1 to nothing.
    assert budget_of(target(2 * share, 48, **sizes), (0, 0, 0)).parameters == 2 * per_unit
    with pytest.raises(UserError, match="removes nothing"):
        budget_of(target(share, 48, **sizes), (0, 0, 0))
