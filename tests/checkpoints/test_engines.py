"""Plain checkpoints' config.json against the rules of engines with their own model code, which are not run.

The rules come from the model code of vLLM and SGLang (llama.py, qwen2.py): the sizes of their parameters, and their
assertions where a layer is split over devices. llama.cpp is really run, see test_llama_cpp.py.
"""

from blank import blank, sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS

from hfprune_dist.checkpoints.pruned_config import is_plain, plain_group_counts, pruned_config
from hfprune_dist.structures.kept import Shape

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
CLASSES |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@st.composite
def pruned(draw):
    """Draw a dense checkpoint, a plain shape of it, and the number of devices that the shape was made for."""
    variant = draw(st.sampled_from(sorted(VARIANTS)))
    model_type = VARIANTS[variant][0].model_type
    dense = blank(variant, **draw(sizes()), architectures=[CLASSES[model_type]])
    config, devices = dense.config, draw(st.sampled_from([1, 1, 2, 4]))
    groups = [count for count in plain_group_counts(dense) if count % devices == 0]
    if not groups or config["intermediate_size"] < devices:
        groups, devices = plain_group_counts(dense), 1
    width = devices * draw(st.integers(1, config["intermediate_size"] // devices))
    layers = draw(st.integers(1, config["num_hidden_layers"]))
    each = {"neurons": width, "kv_groups": draw(st.sampled_from(groups))}
    shape = Shape(tuple(range(layers)), {kind: (count,) * layers for kind, count in each.items()})
    return dense, shape, devices


@settings(max_examples=60)
@given(pruned())
def test_config_json_alone_gives_the_sizes_that_were_written(drawn):
    dense, shape, devices = drawn
    assert is_plain(dense, shape)
    config = pruned_config(dense, shape)
    assert config["architectures"] == [CLASSES[config["model_type"]]]
    assert not {"auto_map", "layer_sizes", "per_layer_config"} & config.keys()
    assert config["hidden_act"] == "silu"
    assert len(config.get("layer_types") or range(len(shape.layers))) == config["num_hidden_layers"]
    heads, groups, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
    assert all(type(size) is int for size in (heads, groups, width))
    assert heads % groups == 0
    assert heads % devices == groups % devices == width % devices == 0
    assert config["model_type"] != "llama" or config["hidden_size"] % heads == 0, "else LlamaConfig refuses"
    assert parameters(config, head_dim_of(config)) == dense.parameter_counts.of(shape)


def head_dim_of(config):
    """Return the head size as llama.py of both engines and qwen3.py compute it."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def parameters(config, head_dim):
    """Return the number of parameters that an engine allocates."""
    hidden, width, model_type = config["hidden_size"], config["intermediate_size"], config["model_type"]
    queries, keys = (config[key] * head_dim for key in ("num_attention_heads", "num_key_value_heads"))
    layer = hidden * (2 * queries + 2 * keys + 3 * width + 2)
    layer += 2 * head_dim if model_type == "qwen3" else 0
    if model_type == "qwen2" or config.get("attention_bias"):
        layer += queries + 2 * keys
    if model_type != "qwen2" and config.get("attention_bias"):
        layer += hidden
    layer += 2 * width + hidden if config.get("mlp_bias") else 0
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return config["num_hidden_layers"] * layer + embeddings + hidden
