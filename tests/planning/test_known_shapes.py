"""Shapes that dry runs predict, against models that transformers makes."""

from itertools import combinations

import pytest
from blank import SMOLLM2, blank, parameters_of
from families import save_model

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.layer_settings import undroppable_layers
from hfprune_dist.checkpoints.pruned_config import pruned_config
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.known_shapes import KnownShape, Span, dense_shape, known_shape
from hfprune_dist.planning.multiples import suited
from hfprune_dist.planning.plain_shapes import fitted_to_layers, plain_shapes, shape_of
from hfprune_dist.planning.shape_target import target_of
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Shape

ALL = ["neurons", "kv_groups", "layers"]
BIASES = {"llama-biases": {"mlp_bias": True, "attention_bias": True}}
SMALL = {"intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def known(ratio=0.2, changes=SMALL, **settings):
    return known_shape(blank("llama", **changes), ratio, Method(**{"criterion": "entropy"} | settings), "m")


def one(number):
    return Span(number, number)


def test_a_dense_model_is_as_it_is():
    assert dense_shape(blank("llama", **SMALL)) == KnownShape(one(3), one(2), one(512), one(0.0))


def test_so_is_a_dense_mixture_with_its_experts(tmp_path):
    shape = dense_shape(open_checkpoint(save_model(tmp_path / "m", "mixtral", num_local_experts=4)))
    assert shape == KnownShape(one(3), one(2), one(24), one(0.0), experts=one(4))


@pytest.mark.parametrize("multiple_of", [1, 32, "auto"])
def test_a_uniform_width_is_known_with_what_it_reaches(multiple_of):
    shape = known(multiple_of=multiple_of)
    width = shape.width.least
    kept, dense = (parameters_of("llama", **SMALL | {"intermediate_size": it}) for it in (width, 512))
    assert shape == KnownShape(one(3), one(2), one(width), one(pytest.approx((dense - kept) / dense)))
    assert abs(shape.reached.least - 0.2) < 0.05 and width % (32 if multiple_of == 32 else 1) == 0


@pytest.mark.parametrize("variant", ["llama", "qwen2", "llama-biases"])
@pytest.mark.parametrize("allocation", ["uniform", "local"])
def test_biases_that_a_refit_adds_count(variant, allocation):
    structures = ALL[:2] if allocation == "local" else ALL[:1]
    method = Method(criterion="fluctuation", allocation=allocation, structures=structures, refit="bias")
    checkpoint = blank(variant.partition("-")[0], **SMALL, **BIASES.get(variant, {}))
    without = known_shape(checkpoint, 0.2, method.model_copy(update={"refit": "none"}), "m").reached
    projections = [name for name, it in zip(("mlp", "attention"), structures, strict=False) if it]
    added = sum(f"{name}_bias" not in BIASES.get(variant, {}) for name in projections)
    more = added * SMALL["num_hidden_layers"] * checkpoint.config["hidden_size"] / checkpoint.parameters
    assert known_shape(checkpoint, 0.2, method, "m").reached == one(pytest.approx(without.least - more))


@pytest.mark.parametrize("model_type", ["starcoder2", "opt", "phi"])
def test_biases_that_an_architecture_has_count_once_and_leave_a_checkpoint_plain(tmp_path, model_type):
    """Whatever its setting for them is called, and even if it has none."""
    checkpoint = open_checkpoint(save_model(tmp_path / "m", model_type))
    method = Method(criterion="fluctuation", refit="bias")
    without = known_shape(checkpoint, 0.1, method.model_copy(update={"refit": "none"}), "m")
    assert known_shape(checkpoint, 0.1, method, "m") == without and without.reached.least > 0.05
    layers = tuple(range(checkpoint.num_layers))
    narrower = Shape(layers, {NEURONS: (without.width.least,) * len(layers)})
    config = pruned_config(checkpoint, narrower, [checkpoint.units.output])
    assert not {"output_biases", "auto_map"} & config.keys()


def test_low_rank_leaves_layers_and_heads_alone():
    shape = known(criterion="lorap", allocation="low_rank")
    assert (shape.layers, shape.kv_heads) == (one(3), one(2))
    assert shape.width.least == shape.width.most < 512 and shape.reached.least == pytest.approx(0.2, abs=0.01)


def test_plain_shapes_are_known_as_those_that_compete():
    shape = known(0.5, SMOLLM2, allocation="plain", structures=ALL)
    assert shape.open == "the closest of 18 shapes, by measurement"
    assert shape.layers == Span(20, 30) and shape.kv_heads.most == 3 and shape.width.least < 672 < shape.width.most
    assert shape.reached.least == pytest.approx(0.5, abs=1e-3) == shape.reached.most


def test_a_plain_shape_without_a_rival_is_known():
    shape = known(0.6, SMALL | {"num_hidden_layers": 1}, allocation="plain", structures=["neurons", "layers"])
    assert shape.open == "" and shape.layers == one(1) and shape.width.least == shape.width.most


@pytest.mark.parametrize("protect_first", [0, 1])
def test_local_shapes_are_known(protect_first):
    both = {"allocation": "local", "structures": ["neurons", "kv_groups"]}
    shape = known(0.4, **both, protect_first=protect_first)
    assert shape.open == "" and shape.layers == one(3) and shape.kv_heads == Span(1, 1 + protect_first)
    assert (shape.width.most == 512) == bool(protect_first) and shape.width.least < 512
    assert shape.reached == one(pytest.approx(0.4, abs=1e-3))


@pytest.mark.parametrize(
    ("allocation", "structures", "layers", "kv_heads", "decides"),
    [
        ("global", ["neurons"], one(3), one(2), "scores"),
        ("global", ["neurons", "kv_groups"], one(3), None, "scores"),
        ("searched", ALL, None, None, "a search"),
    ],
)
def test_what_scores_and_searches_decide_is_left_open(allocation, structures, layers, kv_heads, decides):
    shape = known(allocation=allocation, structures=structures)
    assert (shape.layers, shape.kv_heads, shape.width, shape.reached) == (layers, kv_heads, None, None)
    assert shape.open.startswith(decides)


def test_a_ratio_out_of_reach_is_refused():
    with pytest.raises(UserError, match="can't be reached"):
        known(0.99)


@pytest.mark.parametrize(
    ("model_type", "ratio"), [("gemma4_text", 0.35), ("lfm3", 0.3), ("qwen3_5_text", 0.3), ("llama", 0.3)]
)
@pytest.mark.parametrize("structures", [ALL, ALL[::2]])
def test_what_is_reached_holds_whichever_layers_go(tmp_path, model_type, ratio, structures):
    """Layers with another kind of attention have more parameters than others, or fewer; all widths are the same."""
    checkpoint = open_checkpoint(save_model(tmp_path / "m", model_type))
    method = Method(criterion="entropy", allocation="plain", structures=structures, adapts=True)
    shape = known_shape(checkpoint, ratio, method, "m")
    counts, stuck = checkpoint.parameter_counts, undroppable_layers(checkpoint.config)
    asked = target_of(suited(method, checkpoint), checkpoint, ratio, "m")
    reached, widths = set(), set()
    for plain in plain_shapes(asked):
        for gone in combinations({*range(3)} - stuck.keys(), 3 - plain.num_layers):
            layers = sorted({*range(3)} - {*gone})
            fitted = fitted_to_layers(asked, plain, layers)
            if fitted is not None:
                reached.add(counts.ratio(shape_of(asked, fitted, layers)))
                widths.add(fitted.width)
    assert (shape.reached.least, shape.reached.most) == (min(reached), max(reached))
    assert (shape.width.least, shape.width.most) == (min(widths), max(widths))
    neuron = checkpoint.parameters_per_unit / checkpoint.parameters
    assert all(abs(it - ratio) <= 3 * neuron / 2 + 1e-9 for it in reached), "within rounding of one width"
