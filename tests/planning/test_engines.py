"""Engines that must load what a method makes: they restrict shapes, or refuse them, and a plan names the others."""

import pytest
from blank import blank

from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.ratios import check_ratios, with_numbers
from hfprune_dist.planning.remarks import remarks_on_method
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.planning.target import Target

ALL = ["neurons", "kv_groups", "layers"]
PLAIN = {"criterion": "surgeon", "structures": ALL, "allocation": "plain"}
SIZES = {"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


def shapes(variant, **settings):
    model, method = blank(variant, num_hidden_layers=6, **SIZES), Method(**PLAIN, **settings)
    return shapes_for(Target.from_settings(model, with_numbers(method, model), 0.3, "m"))


def test_shapes_are_those_that_engines_load():
    assert len({shape.units["kv_groups"] for shape in shapes("qwen2") if len(shape.layers) == 6}) > 1
    for variant, groups in (("qwen2", {4}), ("llama", {1, 2, 3, 4})):
        found = shapes(variant, for_engines=["vllm", "llama.cpp"])
        assert {count for shape in found for count in shape.units["kv_groups"]} <= groups
        assert not any(width % 64 for shape in found for width in shape.units["neurons"])


@pytest.mark.parametrize(
    ("settings", "engine", "told"),
    [
        ({"allocation": "searched"}, "mlx", r"mlx \(prune.for_engines\) won't load it: .*can't differ in heads"),
        ({"allocation": "searched"}, "openvino", r"leaves heads alike"),
        ({"allocation": "global", "structures": ["neurons"], "refit": "bias"}, "vllm", "biases"),
        ({"allocation": "global", "structures": ["neurons"]}, "ctranslate2", "differ in widths; .* keeps layers alike"),
    ],
)
def test_what_an_engine_lacks_is_refused(settings, engine, told):
    model = blank("llama", num_hidden_layers=6, **SIZES)
    check_ratios(model, [0.3], Method(**{**PLAIN, **settings}), "m")
    with pytest.raises(UserError, match=told):
        check_ratios(model, [0.3], Method(**{**PLAIN, **settings, "for_engines": [engine]}), "m")
    check_ratios(model, [0.3], Method(**PLAIN, for_engines=[engine]), "m")


def test_a_plan_names_the_engines_that_will_not_load_it():
    model = blank("qwen2", num_hidden_layers=6, **SIZES)
    (remark,) = remarks_on_method(model, Method(**PLAIN), "m", [0.2, 0.3])
    assert remark.startswith("m: mlx, ctranslate2 won't load some shapes: it ignores head_dim in a qwen2; ")
    assert not remarks_on_method(model, Method(**PLAIN, for_engines=["mlx", "ctranslate2"]), "m", [0.2])
    searched = Method(**{**PLAIN, "allocation": "searched"})
    assert len(remarks_on_method(model, searched, "m", [0.2])) >= 2
