import pytest
import torch
from families import save_model
from torch import nn

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.models.norm_factors import weight_offset, with_factors
from hfprune_dist.models.single_layer import LayerReader


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "stablelm"])
@pytest.mark.parametrize("size", [0.0, 1e-3, 3e4])
def test_outputs_are_multiplied_whatever_the_norm_does_with_its_weight(tmp_path, model_type, size):
    """It may add one to it, or have a bias as well; weights may be large or small."""
    checkpoint = open_checkpoint(save_model(tmp_path, model_type))
    norm = LayerReader(checkpoint, torch.float32, torch.device("cpu")).final_norm()
    for parameter in norm.parameters():
        parameter.data += torch.linspace(-0.3, 0.3, len(parameter))
    norm.weight.data[5] = size
    hidden_NC, factors_C = torch.randn(7, len(norm.weight)), torch.linspace(0.5, 1.5, len(norm.weight))
    wanted_NC = norm(hidden_NC) * factors_C
    for name, value in with_factors(norm, factors_C.double()).items():
        norm.get_parameter(name).data = value
    torch.testing.assert_close(norm(hidden_NC), wanted_NC)


def test_a_norm_without_weights_is_one_message():
    with pytest.raises(UserError, match="a norm, LayerNorm, has no weight"):
        weight_offset(nn.LayerNorm(4, elementwise_affine=False))
