"""Engines that a method makes checkpoints for: they restrict shapes, or refuse them."""

import pytest
from blank import blank
from families import save_model

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.export import require_family
from hfprune_dist.planning.ratios import check_ratios, with_numbers
from hfprune_dist.planning.remarks import remarks_on_method
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.planning.target import Target

ALL = ["neurons", "kv_groups", "layers"]
PLAIN = {"criterion": "surgeon", "structures": ALL, "allocation": "plain", "adapts": True}
SIZES = {"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


def shapes(variant, **settings):
    model, method = blank(variant, num_hidden_layers=6, **SIZES), Method(**PLAIN, **settings)
    return shapes_for(Target.from_settings(model, with_numbers(method, model), 0.3, "m"))


def test_shapes_are_those_that_engines_load():
    assert len({shape.units["kv_groups"] for shape in shapes("qwen2") if len(shape.layers) == 6}) > 1
    for variant, groups in (("qwen2", {4}), ("llama", {1, 2, 3, 4})):
        found = shapes(variant, for_engines=["vllm", "llama.cpp"])
        assert {count for shape in found for count in shape.units.get("kv_groups", [4])} == groups
        assert not any(width % 64 for shape in found for width in shape.units["neurons"])


@pytest.mark.parametrize(
    ("settings", "engine", "told"),
    [
        ({"allocation": "searched"}, "mlx", r"mlx \(prune.for_engines\) won't load it: .*can't differ in heads"),
        ({"allocation": "searched"}, "openvino", r"leaves heads alike"),
        ({"allocation": "global", "structures": ["neurons"], "refit": "bias"}, "vllm", "biases"),
        ({"allocation": "global", "structures": ["neurons"]}, "ctranslate2", "differ in widths; .* keeps layers alike"),
        ({"adapts": False}, "ctranslate2", r"ignores head_dim in a llama; .* keeps KV groups"),
    ],
)
def test_what_an_engine_lacks_is_refused(settings, engine, told):
    model = blank("llama", num_hidden_layers=6, **SIZES)
    check_ratios(model, [0.3], Method(**{**PLAIN, **settings}), "m")
    with pytest.raises(UserError, match=told):
        check_ratios(model, [0.3], Method(**{**PLAIN, **settings, "for_engines": [engine]}), "m")
    check_ratios(model, [0.3], Method(**PLAIN, for_engines=[engine]), "m")


def test_a_model_of_images_is_not_of_its_decoders_family(tmp_path):
    model = open_checkpoint(save_model(tmp_path / "model", "smolvlm", intermediate_size=512))
    with pytest.raises(UserError, match=r"llama.cpp .* won't load it"):
        check_ratios(model, [0.3], Method(criterion="entropy", for_engines=["llama.cpp"]), "m")
    with pytest.raises(UserError, match="not for a smolvlm"):
        require_family(model, ["llama"], "GGUF", "")


def test_that_kv_groups_stay_is_told():
    model = blank("qwen2", num_hidden_layers=6, **SIZES)
    for engines, told in (
        (["mlx", "openvino", "ctranslate2"], "m: KV groups stay: mlx, ctranslate2 ignore head_dim in a qwen2"),
        (["openvino", "mlx"], "m: KV groups stay: mlx ignores head_dim in a qwen2"),
    ):
        assert remarks_on_method(model, Method(**PLAIN, for_engines=engines), "m") == [told]
    assert not remarks_on_method(model, Method(**PLAIN), "m")
