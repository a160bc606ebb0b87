"""Checkpoints without some neurons, KV groups and layers, compared with the dense model that has these masked."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from families_masked import masked, through_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import kept_of, models, write
from tiny import edit_json, save_tiny
from transformers import AutoModelForCausalLM
from transformers.integrations.heterogeneity.configuration_utils import HeterogeneousConfigMixin

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.pruned_config import is_plain, plain_group_counts
from hfprune_dist.models.loading import load_causal_lm, require_own_weights
from hfprune_dist.structures.kept import Kept

IDS = torch.randint(3, 250, (2, 11), generator=torch.Generator().manual_seed(0))
EXACT = {"rtol": 1e-9, "atol": 1e-9}
drawn = settings(max_examples=16)


@torch.no_grad()
def logits(model):
    return model.double()(IDS).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)


@drawn
@given(st.data())
def test_a_checkpoint_computes_what_the_masked_model_does_and_is_pruned_again(data):
    model, uniform = data.draw(models()), data.draw(st.booleans())
    kept = data.draw(kept_of(model, uniform=uniform))
    with TemporaryDirectory() as name:
        dense, pruned, again = (Path(name) / folder for folder in ("dense", "pruned", "again"))
        checkpoint = open_checkpoint(save_tiny(dense, **model, shard_size=data.draw(st.sampled_from(["5GB", "20KB"]))))
        write(checkpoint, kept, pruned)
        smaller = open_checkpoint(pruned)
        require_own_weights(smaller)
        has_code = bool(list(pruned.glob("*.py")))
        assert smaller.is_plain == is_plain(checkpoint, kept.shape) == (not has_code)
        assert has_code == ("auto_map" in smaller.config)
        assert smaller.is_plain or not uniform or model["variant"] == "llama-tied-biases"
        loaded, theirs = load_causal_lm(pruned, torch.float64), load(pruned, trust_remote_code=has_code)
        torch.testing.assert_close(logits(loaded), logits(masked(checkpoint, kept)), **EXACT)
        assert torch.equal(logits(loaded), logits(theirs))
        through_layers(smaller, theirs, IDS)
        assert checkpoint.parameter_counts.after(kept.shape) == smaller.parameters == loaded.num_parameters()
        for kind, units in checkpoint.structures.items():
            assert smaller.structures[kind].counts == kept.shape.counts(units)

        sizes = [smaller.structures[kind].counts for kind in ("neurons", "kv_groups")]
        model |= {"num_hidden_layers": smaller.num_layers}
        model |= dict(zip(("intermediate_size", "num_key_value_heads"), map(min, sizes), strict=True))
        second = data.draw(kept_of(model, uniform=data.draw(st.booleans())))
        write(smaller, second, again)
        twice = load_causal_lm(again, torch.float64)
        torch.testing.assert_close(logits(twice), logits(masked(smaller, second)), **EXACT)
        parameters = smaller.parameter_counts.after(second.shape)
        assert open_checkpoint(again).parameters == twice.num_parameters() == parameters


RAGGED = Kept((0, 2), {"neurons": [torch.arange(5), torch.arange(3)], "kv_groups": [torch.arange(1), torch.arange(2)]})


@pytest.mark.parametrize("variant", ["llama-tied-biases", "qwen3"])
def test_layers_that_differ_load_with_the_code_in_their_folder_and_generate(tmp_path, variant):
    write(open_checkpoint(save_tiny(tmp_path / "dense", variant, num_hidden_layers=3)), RAGGED, tmp_path / "pruned")
    loaded = load(tmp_path / "pruned", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    for layer, told in zip(loaded.model.layers, loaded.config.per_layer_config, strict=True):  # as vLLM reads heads
        own, size = layer.self_attn, layer.self_attn.head_dim
        heads = own.q_proj.out_features // size, own.k_proj.out_features // size
        assert (told.num_attention_heads, told.num_key_value_heads) == heads
    loaded.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in loaded.model.layers} == {"eager"}
    loaded.set_attn_implementation("sdpa")

    steps = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}
    dense = masked(open_checkpoint(tmp_path / "dense"), RAGGED).double()
    without_cache = dense.generate(IDS, **steps, use_cache=False)
    assert torch.equal(loaded.generate(IDS, **steps, use_cache=False), without_cache)
    for cache in (
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True},
    ):
        assert torch.equal(loaded.generate(IDS, **steps, **cache), without_cache), cache


def test_layers_that_differ_load_where_transformers_has_no_settings_of_single_layers(tmp_path, monkeypatch):
    """As in transformers 4.57 and 5.5, with which this was run too."""
    write(open_checkpoint(save_tiny(tmp_path / "dense", num_hidden_layers=3)), RAGGED, tmp_path / "pruned")
    expected = load(tmp_path / "pruned", trust_remote_code=True)(IDS, use_cache=False).logits
    monkeypatch.delattr(HeterogeneousConfigMixin, "per_layer_config")
    loaded = load(tmp_path / "pruned", trust_remote_code=True)
    assert torch.equal(loaded(IDS, use_cache=False).logits, expected)


ROPES = [{}, {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}]


@drawn
@given(
    groups=st.integers(2, 8),
    queries=st.integers(1, 4),
    kept_groups=st.integers(1, 8),
    rope=st.sampled_from(ROPES),
    tied=st.booleans(),
)
def test_a_llama_whose_heads_do_not_divide_is_written_as_mistral(groups, queries, kept_groups, rope, tied):
    kept_groups, heads = min(kept_groups, groups), groups * queries
    hidden = 4 * heads
    with TemporaryDirectory() as name:
        dense, pruned = Path(name) / "dense", Path(name) / "pruned"
        sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups}
        save_tiny(dense, tie_word_embeddings=tied, num_hidden_layers=1, intermediate_size=6, **sizes)
        edit_json(dense / "config.json", "rope_parameters", "head_dim", "max_position_embeddings", **rope)
        checkpoint = open_checkpoint(dense)
        kept = Kept.of_all_layers({"kv_groups": [torch.arange(groups - kept_groups, groups)]})
        write(checkpoint, kept, pruned)
        loaded = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
        divides = hidden % (kept_groups * queries) == 0
        assert loaded.config.model_type == ("llama" if divides else "mistral")
        assert is_plain(checkpoint, kept.shape) and plain_group_counts(checkpoint) == list(range(1, groups + 1))
        torch.testing.assert_close(logits(loaded), logits(masked(checkpoint, kept)), rtol=1e-5, atol=1e-5)
