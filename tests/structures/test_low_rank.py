"""Low-rank projections as recorded in config.json and tensors."""

from hfprune_dist.structures.low_rank import linear_modules, read_ranks, with_products
from hfprune_dist.structures.units import LAYER_SIZES

FACTORS = {"self_attn.q_proj.0.weight": [3, 32], "self_attn.q_proj.1.weight": [16, 3]}
OTHERS = {"self_attn.k_proj.weight": [8, 32], "self_attn.k_proj.bias": [8]}
CONFIG = {LAYER_SIZES: {"q_proj_rank": [3, 5]}}


def test_factors_count_as_the_matrix_that_they_stand_for():
    assert with_products(CONFIG, FACTORS | OTHERS) == OTHERS | {"self_attn.q_proj.weight": [16, 32]}
    biased = FACTORS | {"self_attn.q_proj.1.bias": [16]}
    assert with_products(CONFIG, biased) == {"self_attn.q_proj.weight": [16, 32], "self_attn.q_proj.bias": [16]}


def test_what_config_json_does_not_call_low_rank_is_left_alone():
    assert with_products({LAYER_SIZES: {"k_proj_rank": [3, 5]}}, FACTORS | OTHERS) == FACTORS | OTHERS


def test_ranks_are_those_of_the_projections_asked_for():
    assert read_ranks(CONFIG, "self_attn", ["q_proj", "k_proj"]) == {"self_attn.q_proj": (3, 5)}
    assert read_ranks({}, "self_attn", ["q_proj"]) == read_ranks(CONFIG, "self_attn", ["k_proj"]) == {}
    assert linear_modules("q_proj", {"q_proj": 3}) == ("q_proj.0", "q_proj.1")
    assert linear_modules("k_proj", {"q_proj": 3}) == ("k_proj",)
