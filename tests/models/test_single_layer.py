import pytest
import torch
from families import save_model
from families_masked import through_layers
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import LayerReader, before_down, output_for_update, part_of, residual_update

CPU = torch.device("cpu")


def test_layer_after_layer_and_the_head_are_the_whole_model_in_bfloat16_too(tmp_path):
    folder, dtype = save_tiny(tmp_path, "mistral", sliding_window=4), torch.bfloat16
    input_ids_BT = torch.randint(264, (2, 12), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    through_layers(open_checkpoint(folder), model, input_ids_BT, tolerance=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-3, 1e6])
def test_an_output_of_any_size_is_what_its_own_effect_needs_and_channels_without_effect_need_none(tmp_path, size):
    """gemma2 has a norm after its MLP."""
    checkpoint = open_checkpoint(save_model(tmp_path, "gemma2"))
    layer = LayerReader(checkpoint, torch.float32, CPU).layer(0)
    norm = part_of(layer, checkpoint.units.block.norm_after)
    norm.weight.data = torch.linspace(-0.95, 0.95, len(norm.weight))  # plus one
    norm.weight.data[3] = -1
    output_NC = torch.randn(5, len(norm.weight), generator=torch.Generator().manual_seed(0)) * size
    update_NC = residual_update(layer, checkpoint.units, output_NC)
    needed_NC = output_for_update(layer, checkpoint.units, update_NC, output_NC)
    output_NC[:, 3] = 0
    torch.testing.assert_close(needed_NC, output_NC, rtol=1e-3, atol=0)


def test_an_activation_that_is_no_module_is_silu_only_where_that_is_known(tmp_path):
    checkpoint = open_checkpoint(save_model(tmp_path / "lfm2", "lfm2"))
    layer = LayerReader(checkpoint, torch.float32, CPU).layer(0)
    assert before_down(layer, checkpoint.units).activation is torch.nn.functional.silu
    checkpoint = open_checkpoint(save_model(tmp_path / "llama", "llama"))
    layer = LayerReader(checkpoint, torch.float32, CPU).layer(0)
    del part_of(layer, checkpoint.units.block.name).act_fn
    with pytest.raises(UserError, match="activation of LlamaMLP isn't known"):
        before_down(layer, checkpoint.units)
