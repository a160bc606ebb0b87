import pytest
from families import save_model
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.results.native_ratios import Decoder, native_ratios

LLAMA_7B = Dimensions(4096, 11008, 32, 32, 32, 128, 32000, tied=False)


@pytest.mark.parametrize(
    ("layers_that_lose", "share_of_units", "share_of_parameters"),
    [(26, 0.25, 0.195), (26, 0.5, 0.39), (28, 0.2, 0.165), (28, 0.5, 0.42), (32, 0.2, 0.192), (32, 0.5, 0.481)],
)
def test_what_papers_removed_of_llama_7b(layers_that_lose, share_of_units, share_of_parameters):
    """LLM-Pruner prunes 26 layers, LoRAPrune 28, FLAP and LoRAP all."""
    width, heads = round(11008 * (1 - share_of_units)), round(32 * (1 - share_of_units))
    kept = 32 - layers_that_lose
    per_neuron, per_head = 3 * 4096, 4 * 128 * 4096
    removed = layers_that_lose * ((11008 - width) * per_neuron + (32 - heads) * per_head)
    assert removed / LLAMA_7B.parameters == pytest.approx(share_of_parameters, abs=0.004)  # heads are few
    sizes = {
        "intermediate_sizes": [11008] * kept + [width] * layers_that_lose,
        "num_key_value_heads_by_layer": [32] * kept + [heads] * layers_that_lose,
    }
    found = native_ratios(Decoder.of_dimensions(LLAMA_7B), removed, sizes)
    assert found["ratio_of_pruned_layers"] == pytest.approx(share_of_units, abs=0.005)
    assert found["ratio_of_decoder"] == pytest.approx(share_of_units * layers_that_lose / 32, abs=0.005)


def test_a_dense_checkpoint_has_a_decoder_and_a_mixture_of_experts_none(tmp_path):
    dense = open_checkpoint(save_model(tmp_path / "dense", "llama"))
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 24
    assert Decoder.of(dense) == Decoder(3 * (attention + mlp), 3, 24, 2)
    assert Decoder.of(open_checkpoint(save_model(tmp_path / "experts", "mixtral"))) is None


@st.composite
def shapes(draw):
    layers, width, groups = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    staying = draw(st.integers(1, layers))
    row = st.lists(st.integers(1, width), min_size=staying, max_size=staying)
    heads = st.lists(st.integers(1, groups), min_size=staying, max_size=staying)
    return Decoder(60 * layers, layers, width, groups), draw(row), draw(heads)


@given(shapes())
def test_layers_that_stay_whole_are_no_part_of_what_was_pruned(drawn):
    decoder, widths, heads = drawn
    sizes = {"num_hidden_layers": len(widths), "intermediate_sizes": widths, "num_key_value_heads_by_layer": heads}
    whole = sum(
        pair == (decoder.intermediate_size, decoder.num_key_value_heads) for pair in zip(widths, heads, strict=True)
    )
    found = native_ratios(decoder, 30, sizes)
    assert found["ratio_of_decoder"] == 30 / decoder.matrices
    pruned = decoder.layers - whole
    assert found["ratio_of_pruned_layers"] == pytest.approx(30 / (60 * pruned) if pruned else 0.0)


def test_one_width_says_as_much_as_a_list():
    decoder = Decoder(120, 2, 8, 2)
    one = native_ratios(decoder, 30, {"intermediate_size": 6})
    assert (
        one
        == native_ratios(decoder, 30, {"intermediate_sizes": [6, 6]})
        == {
            "ratio_of_decoder": 0.25,
            "ratio_of_pruned_layers": 0.25,
        }
    )


def test_a_layer_that_went_as_a_whole_was_pruned():
    found = native_ratios(Decoder(120, 3, 8, 2), 40, {"num_hidden_layers": 2, "intermediate_size": 8})
    assert found == {"ratio_of_decoder": 40 / 120, "ratio_of_pruned_layers": 1.0}


def test_a_layer_whose_attention_has_low_rank_is_pruned_even_if_rounding_leaves_all_its_neurons():
    sizes = {"intermediate_size": 8, "intermediate_sizes": [8, 8], "attention_ranks": {"q_proj": 3}}
    assert native_ratios(Decoder(120, 2, 8, 2), 30, sizes)["ratio_of_pruned_layers"] == 0.25


@pytest.mark.parametrize(("decoder", "removed"), [(None, 5), (Decoder(120, 2, 8, 2), None)])
def test_what_is_not_known_stays_so(decoder, removed):
    unknown = {"ratio_of_decoder": None, "ratio_of_pruned_layers": None}
    assert native_ratios(decoder, removed, {"intermediate_size": 6}) == unknown
