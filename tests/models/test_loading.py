"""Loading whole models: what holds for every model, which weights are its own, and which models are refused."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import ALL_SEEING, save_model
from families_masked import through_layers
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.models.loading import load_causal_lm, require_own_weights
from hfprune_dist.models.single_layer import LayerReader


def test_a_head_is_not_tied_where_only_the_default_of_a_class_says_so(tmp_path):
    """transformers compares it with the embedding to tell, and two sharded tensors look alike to it."""
    folder = save_model(tmp_path / "m", "mistral3")
    stated = json.loads((folder / "config.json").read_text())
    for config in (stated, stated["text_config"]):
        config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(stated))
    file, head = folder / "model.safetensors", torch.randn(64, 32)
    save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings and not checkpoint.config["tie_word_embeddings"]
    model = load_causal_lm(folder, torch.float32)
    assert not model.config.tie_word_embeddings
    assert torch.equal(checkpoint.family.head_of(model).weight, head)


def test_every_tensor_is_needed_and_has_one_shape(tmp_path):
    """One tensor of each kind is left out of all layers, or has another shape."""
    folder = save_tiny(tmp_path / "m", "llama-tied-biases")
    whole = load_file(folder / "model.safetensors")
    for name in [name for name in whole if "layers.0" in name]:
        part = name.partition("layers.0.")[2]
        without = {other: tensor for other, tensor in whole.items() if part not in other}
        change_and_refuse(folder, without, "" if "mlp." in part else part)
        change_and_refuse(folder, {**whole, name: torch.cat([whole[name], whole[name][:1]])}, name)


def change_and_refuse(folder, weights, expected):
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as caught:
        require_own_weights(open_checkpoint(folder))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "part"),
    [("glm4_moe", "gate.e_score_correction_bias"), ("llava", "multi_modal_projector"), ("llava", "vision_tower")],
)
def test_buffers_and_what_sees_images_are_needed_too(tmp_path, model_type, part):
    """The text decoder has no such parameters, and loading would make them up."""
    folder = save_model(tmp_path / "m", model_type)
    require_own_weights(open_checkpoint(folder))
    weights = load_file(folder / "model.safetensors")
    change_and_refuse(folder, {name: weight for name, weight in weights.items() if part not in name}, part)


def test_a_text_decoder_that_transformers_does_not_run_is_refused(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_SEEING, "llava", ALL_SEEING["llava"] | {"text_config": {"model_type": "gemma2"}})
        folder = save_model(tmp_path / "m", "llava")
    with pytest.raises(UserError, match=r"transformers can't make this model: .*Gemma2Model does not support"):
        require_own_weights(open_checkpoint(folder))


@pytest.mark.parametrize("variant", ["gemma2", "mistral3"])
def test_outputs_have_names_whatever_a_config_says(tmp_path, variant):
    """config.json may ask for tuples, or for the states and the attention of every layer."""
    folder = save_model(tmp_path / "m", variant)
    stated = json.loads((folder / "config.json").read_text())
    for config in (stated, stated.get("text_config", {})):
        config.update(return_dict=False, output_hidden_states=True)
    if "text_config" not in stated:  # of images and text, transformers makes no model that returns its attention
        stated["output_attentions"] = True
    (folder / "config.json").write_text(json.dumps(stated))
    checkpoint = open_checkpoint(folder)
    require_own_weights(checkpoint)
    model = load_causal_lm(folder, torch.float32)
    windows = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    for part in (model, checkpoint.family.body_of(model)):
        outputs = part(input_ids=windows, use_cache=False)
        assert outputs.hidden_states is None and outputs.attentions is None
    through_layers(checkpoint, model, windows)


def test_models_made_in_threads_leave_defaults_as_they_were(tmp_path):
    """transformers changes the defaults meanwhile, for the process rather than for a thread."""
    folder = save_tiny(tmp_path / "tied", "llama-tied-biases")
    checkpoint = open_checkpoint(folder)

    def make(number):
        if number % 2:
            return load_causal_lm(folder, torch.bfloat16)
        return LayerReader(checkpoint, torch.bfloat16, torch.device("cpu")).layer(0)

    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(make, range(16)))) == 16
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.get_default_dtype() == model.dtype == torch.float32
