"""Models of images and text: their text decoders are pruned, and everything else stays as it was."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from families import ALL_SEEING, IMAGE_TOKEN, IMAGE_TOKENS, save_model
from families_masked import assert_same, load, masked, some_kept, two_layers
from masking import write
from mixtures import some_kept as some_kept_of_mixtures
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.text_decoder import beside_decoder
from hfprune_dist.models.loading import load_causal_lm, require_own_weights

every_model = pytest.mark.parametrize("model_type", ALL_SEEING)
TEXT = [5, 6, 7, 8]
SIZES = {"intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"}
SIZES |= {"layer_types", "max_window_layers", "moe_intermediate_size", "shared_expert_intermediate_size"}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    def make(name):
        folder = save_model(tmp_path_factory.mktemp(name) / "model", name)
        (folder / "preprocessor_config.json").write_text('{"size": 28}')
        return open_checkpoint(folder)

    return functools.cache(make)


@torch.no_grad()
def logits_of(model, model_type):
    """Return the logits of a text with a random image in it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, *TEXT, *[IMAGE_TOKEN] * IMAGE_TOKENS, *reversed(TEXT)]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    if model_type.startswith("qwen"):
        inputs["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}
    if model_type in ("smolvlm", "idefics3"):
        inputs["pixel_values"] = inputs["pixel_values"][:, None]
    if model_type == "mistral3":
        inputs["image_sizes"] = torch.tensor([[28, 28]])
    if model_type == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).int()
    without = model(input_ids=ids, use_cache=False).logits
    seen = model(**inputs, use_cache=False).logits
    assert (seen - without).abs().max() > 1e-2 * seen.abs().max(), "the image must be seen"
    return seen


@every_model
def test_with_an_image_it_is_the_masked_model_and_nothing_but_the_decoder_changes(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    if checkpoint.family.experts:
        kept = some_kept_of_mixtures(checkpoint, 2 / 3)
    else:
        kept = some_kept(checkpoint, two_layers(checkpoint), (15, 15))
    write(checkpoint, kept, tmp_path)
    require_own_weights(open_checkpoint(tmp_path))
    assert_same(logits_of(load(tmp_path), model_type), logits_of(masked(checkpoint, kept), model_type))
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint.path, tmp_path))
    beside = beside_decoder(checkpoint.tensors)
    assert len(beside) > 10 and all(torch.equal(before[name], after[name]) for name in beside)
    was, became = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint.path, tmp_path))
    text_was, text_became = was.pop("text_config"), became.pop("text_config")
    assert became == was
    assert {key for key, value in text_was.items() if text_became.get(key) != value} <= SIZES
    assert (tmp_path / "preprocessor_config.json").read_text() == '{"size": 28}'


def renamed(source, folder, names, config):
    """Write the same checkpoint with other names in its file, and another config.json."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for ours, theirs in names.items():
        tensors = {
            theirs + tensor.removeprefix(ours) if tensor.startswith(ours) else tensor: tensors[tensor]
            for tensor in tensors
        }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def flat(config):
    """Return a config.json in the layout that qwen2_5_vl had before text_config existed."""
    text = {key: value for key, value in config["text_config"].items() if key not in ("model_type", "dtype")}
    return {key: value for key, value in config.items() if key != "text_config"} | text


LAYOUTS = {
    "gemma3": (
        {
            "language_model.model.": "model.language_model.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
        lambda config: config,
    ),
    "qwen2_5_vl": ({}, flat),
    "qwen3_vl": ({}, lambda config: config),
}


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_other_layouts_of_files_are_read_and_kept(checkpoint_of, tmp_path, model_type):
    checkpoint, (names, change) = checkpoint_of(model_type), LAYOUTS[model_type]
    other = renamed(checkpoint.path, tmp_path / "other", names, change(dict(checkpoint.whole)))
    require_own_weights(other)
    kept = some_kept(checkpoint, two_layers(checkpoint), (15, 15))
    write(other, kept, tmp_path / "pruned")
    assert_same(logits_of(load(tmp_path / "pruned"), model_type), logits_of(masked(checkpoint, kept), model_type))
    assert ("text_config" in open_checkpoint(tmp_path / "pruned").whole) == ("text_config" in other.whole)
    assert {tensor.split(".")[0] for tensor in load_file(tmp_path / "pruned" / "model.safetensors")} == {
        tensor.split(".")[0] for tensor in load_file(other.path / "model.safetensors")
    }


@pytest.mark.parametrize("widths", [(15, 15), (15, 11)], ids=["plain", "of each layer"])
def test_a_decoder_that_was_saved_without_its_encoder_is_pruned(checkpoint_of, tmp_path, widths):
    """transformers then gives its tensors the names that they have in the whole model."""
    decoder = tmp_path / "decoder"
    AutoModelForCausalLM.from_pretrained(checkpoint_of("qwen3_5").path).save_pretrained(decoder)
    tiny_tokenizer().save_pretrained(decoder)
    checkpoint = open_checkpoint(decoder)
    require_own_weights(checkpoint)
    kept = some_kept(checkpoint, two_layers(checkpoint), widths)
    write(checkpoint, kept, tmp_path / "pruned")
    theirs = load(tmp_path / "pruned", trust_remote_code=len({*widths}) > 1)
    models = theirs, load_causal_lm(tmp_path / "pruned", torch.float32), masked(checkpoint, kept)
    by_them, by_us, wanted = (model(input_ids=torch.tensor([[1, *TEXT]]), use_cache=False).logits for model in models)
    assert_same(by_them, wanted)
    assert_same(by_us, wanted)
