"""Numbers that plans share with code they don't import, since it needs torch: they change together."""

import pytest

from hfprune_dist.core import drop_order, final_norm, least_squares, quasi_newton, width_search
from hfprune_dist.distributed import gram_sums
from hfprune_dist.planning import expected_metrics, layer_pass_footprint, layer_pass_work, search_work
from hfprune_dist.refit import final_norm_refit, gauss_newton_ranks, norms_refit
from hfprune_dist.stages import cheap_measurement, finals

# Two on each axis around each centre, the first centre, and the last.
SHAPES_OF_A_SEARCH = 2 * len(width_search.STEPS) * width_search.ROUNDS + 2


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (expected_metrics, "SEARCHED", SHAPES_OF_A_SEARCH),
        (expected_metrics, "NORM_PASSES", final_norm.PASSES),
        (expected_metrics, "NORMS_PASSES", quasi_newton.PASSES),
        (layer_pass_footprint, "NORM_TOKENS", final_norm_refit.TOKENS),
        (layer_pass_footprint, "NORM_TOKENS_AT_ONCE", norms_refit.AT_ONCE),
        (layer_pass_work, "HOLD_OUT_EVERY", gram_sums.HOLD_OUT_EVERY),
        (layer_pass_work, "RIDGES", len(least_squares.RIDGES)),
        (layer_pass_work, "ITERATIONS", gauss_newton_ranks.ITERATIONS),
        (layer_pass_work, "STEP_LENGTHS", len(gauss_newton_ranks.STEP_LENGTHS)),
        (search_work, "WINDOWS", cheap_measurement.WINDOWS),
        (search_work, "WINDOWS_OF_ORDER", cheap_measurement.WINDOWS_OF_ORDER),
        (search_work, "EVERY", cheap_measurement.EVERY),
        (search_work, "JUDGED_EVERY", finals.JUDGED_EVERY),
        (search_work, "FINALISTS", finals.FINALISTS),
        (search_work, "CONTENDERS", drop_order.CONTENDERS),
        (search_work, "MEASUREMENTS", width_search.MEASUREMENTS),
    ],
)
def test_plans_count_with_the_numbers_of_the_code(module, name, number):
    assert getattr(module, name) == number
