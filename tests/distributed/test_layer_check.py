"""Single layers are compared with the whole model once; architectures that they don't reproduce are refused."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from ranks import SoloWorld, on_ranks
from safetensors.torch import load_file, save_file
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from hfprune_dist.checkpoints import families as families_module
from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core.head import AfterHead
from hfprune_dist.distributed import layer_check
from hfprune_dist.distributed.layer_check import check_layers
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import LayerReader

LAYERS = 3
WINDOW_T = torch.randint(3, 264, (40,), generator=torch.Generator().manual_seed(0))


def checkpoint_in(folder, variant="llama", **sizes):
    return open_checkpoint(tiny.save_tiny(folder, variant, num_hidden_layers=LAYERS, **sizes))


def check(checkpoint, dtype=torch.float32, sharding="auto", world=None):
    check_layers(checkpoint, WINDOW_T, dtype, sharding, world or SoloWorld())


def test_an_architecture_whose_layers_depend_on_their_number_is_refused_with_its_place(tmp_path, monkeypatch):
    monkeypatch.delitem(families_module._UNFIT, "diffllama")  # as if this weren't known yet
    variant = DiffLlamaConfig, DiffLlamaForCausalLM, {"tie_word_embeddings": False}
    monkeypatch.setitem(tiny.VARIANTS, "diffllama", variant)
    with pytest.raises(UserError, match=r"diffllama: .* outputs of layer 1 depart from the whole model's by"):
        check(checkpoint_in(tmp_path / "model", "diffllama"), torch.bfloat16)


@pytest.mark.parametrize(
    ("part", "place"),
    [("embed", "embeddings"), ("layer", "outputs of layer 0"), ("final_norm", "final norm's outputs")],
)
def test_a_departure_is_found_at_every_place(tmp_path, monkeypatch, part, place):
    original = getattr(LayerReader, part)

    def scaled(self, *arguments):
        made = original(self, *arguments)
        if part == "embed":
            return {index: hidden_BTC * 1.001 for index, hidden_BTC in made.items()}
        made.register_forward_hook(lambda _module, _inputs, output: _scale(output))
        return made

    monkeypatch.setattr(LayerReader, part, scaled)
    with pytest.raises(UserError, match=f"{place} depart"):
        check(checkpoint_in(tmp_path / "model"))


def _scale(output):
    if isinstance(output, torch.Tensor):
        return output * 1.001
    output.last_hidden_state = output.last_hidden_state * 1.001
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("damage", "refusal"), [("nan", "logits are NaN or infinite"), ("scale", "logits of qwen3 depart")]
)
def test_every_pass_layer_by_layer_checks_logits(tmp_path, monkeypatch, damage, refusal, dtype):
    """Those of refits, distillation and fidelity, too, where a head made NaN, or something else, without a name."""
    folder = tiny.save_tiny(tmp_path / "model", "qwen3", num_hidden_layers=LAYERS, dtype=dtype)
    check(open_checkpoint(folder), dtype)
    if damage == "nan":
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"][7, 3] = torch.nan
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        monkeypatch.setattr(layer_check, "after_head", lambda _: AfterHead(1.1))
    with pytest.raises(UserError, match=refusal):
        check(open_checkpoint(folder), dtype)


def test_sharded_models_are_compared_as_well(tmp_path, monkeypatch):
    checkpoint, embed = checkpoint_in(tmp_path / "model", hidden_size=256, intermediate_size=416), LayerReader.embed

    def compare(world):
        check(checkpoint, torch.bfloat16, "zero3", world)
        monkeypatch.setattr(LayerReader, "embed", lambda self, windows: {0: 2 * embed(self, windows)[0]})
        departs = pytest.raises(UserError, match="embeddings depart") if world.is_first else nullcontext()
        with departs:
            check(checkpoint, torch.bfloat16, "zero3", world)

    assert on_ranks(2, compare) == [0, 0]
