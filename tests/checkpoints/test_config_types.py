"""Nonsense in a config.json or in headers is refused with its name, and never ends in any other exception."""

from __future__ import annotations

import functools
import json
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
from families import EXPERTS, FAMILIES, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from more_families import MORE_EXPERTS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.checks import check_config
from hfprune_dist.checkpoints.config_types import check_types
from hfprune_dist.checkpoints.families import normalized
from hfprune_dist.checkpoints.layer_settings import (
    ATTENTION_LAYER_LISTS,
    LISTS,
    OF_THE_FIRST,
    PERIODS,
    of_layers,
    undroppable_layers,
)
from hfprune_dist.checkpoints.text_decoder import DEEPSTACK
from hfprune_dist.errors import UserError
from hfprune_dist.structures.experts import (
    ALL_WIDTHS,
    CHOSEN,
    EXPERT_COUNT_KEYS,
    LAYERS_WITHOUT,
    PLACES,
    SHARED_NUMBERS,
    SHARED_WIDTHS,
)

KEYS = (
    *LISTS,
    *ATTENTION_LAYER_LISTS,
    *OF_THE_FIRST,
    *PERIODS,
    *PERIODS.values(),
    *PLACES,
    *ALL_WIDTHS,
    *SHARED_WIDTHS,
    *SHARED_NUMBERS,
    LAYERS_WITHOUT,
    *CHOSEN,
    *EXPERT_COUNT_KEYS,
    "auto_map",
    DEEPSTACK,
)
NONSENSE = st.sampled_from([None, True, -1, 0, 1, 7, 2.5, "a", [], ["a"], [[1]], [1, 2, 3], {}, {"0": 1}])
MODELS = ("llama", "gpt_neox", "glm4_moe", "jamba", "granitemoeshared", "ernie4_5_moe", "llava")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def made(name):
        return save_model(tmp_path_factory.mktemp(name) / "model", name, **MORE_EXPERTS.get(name, {}))

    return made


def is_refused(folder):
    """Return whether opening a folder is refused; if it opens, compute everything that planning asks of it."""
    try:
        checkpoint = open_checkpoint(folder)
        assert checkpoint.parameters > 0 and checkpoint.structures
        assert undroppable_layers(checkpoint.config) or of_layers(checkpoint.config, [0])
    except UserError as error:
        assert str(folder) in str(error) and "a fault of hfprune_dist" not in str(error)
        return True
    return False


@contextmanager
def holding(file, content):
    """Give a file other content within the context."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", MODELS)
@settings(derandomize=True, deadline=None)
@given(data=st.data())
def test_any_value_of_any_key_is_taken_or_told(folder_of, name, data):
    file = folder_of(name) / "config.json"
    whole = json.loads(file.read_bytes())
    config = whole.get("text_config", whole)
    config[data.draw(st.sampled_from(sorted({*config, *KEYS})))] = data.draw(NONSENSE)
    with holding(file, json.dumps(whole).encode()):
        is_refused(file.parent)


@pytest.mark.parametrize("name", MODELS)
@settings(derandomize=True, deadline=None)
@given(data=st.data())
def test_a_tensor_of_any_shape_is_taken_or_told(folder_of, name, data):
    file = folder_of(name) / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    tensor = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    (size,) = {(end - begin) // 4 for begin, end in [header[tensor]["data_offsets"]]}
    header[tensor]["shape"] = data.draw(st.sampled_from([[size], [1, size], [size, 1], [1, 1, size]]))
    changed = json.dumps(header).encode()
    with holding(file, struct.pack("<Q", len(changed)) + changed + content[8 + length :]):
        is_refused(file.parent)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"first_k_dense_replace": "a"}, "first_k_dense_replace must be an integer, not 'a'"),
        ({"moe_intermediate_size": [24, 24, 24]}, "moe_intermediate_size must be an integer, not [24, 24, 24]"),
        ({"mlp_layer_types": ["sparse"]}, "mlp_layer_types must be a list with an entry for each of 3 layers"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be a positive integer, not 0"),
        ({"mlp_only_layers": 1}, "mlp_only_layers must be a list, not 1"),
        ({"mlp_only_layers": [1, "a"]}, "mlp_only_layers must be a list of integers, not [1, 'a']"),
        ({"full_attn_idxs": [[1]]}, "full_attn_idxs must be a list of integers, not [[1]]"),
        ({"architectures": "Glm4MoeForCausalLM"}, "architectures must be a list, not 'Glm4MoeForCausalLM'"),
    ],
)
def test_the_key_and_what_it_must_be_are_named(folder_of, tmp_path, changes, told):
    shutil.copytree(folder_of("glm4_moe"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        open_checkpoint(file.parent)
    assert str(caught.value).startswith(f"{file}: {told}")


@pytest.mark.parametrize("model_type", FAMILIES | EXPERTS | MORE_EXPERTS)
def test_the_sizes_of_the_model_that_a_class_was_made_for_are_taken(model_type):
    """They are its defaults, with what its files state besides."""
    stated = {"head_dim": 128} if model_type == "glm4_moe" else {}
    config = normalized(CONFIG_MAPPING[model_type]().to_dict() | stated)
    check_config(config, Path("config.json"))
    check_types(config, "config.json")
