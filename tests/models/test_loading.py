"""Loading whole models: what must hold of every one."""

import pytest
import torch
from tiny import VARIANTS, save_tiny

from hfprune_dist.errors import UserError
from hfprune_dist.models.checkpoint import open_checkpoint
from hfprune_dist.models.layers import LayerReader
from hfprune_dist.models.loading import load_causal_lm, require_exact_rotary


def frequencies(model):
    return {name: buffer.dtype for name, buffer in model.named_buffers() if name.endswith("inv_freq")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotary_frequencies_stay_float32(tmp_path, variant):
    folder = save_tiny(tmp_path, variant)
    layer = LayerReader(open_checkpoint(folder), torch.bfloat16, torch.device("cpu")).layer(1)
    for model in (load_causal_lm(folder, torch.bfloat16), layer):
        assert set(frequencies(model).values()) == {torch.float32}


def test_rounded_rotary_frequencies_are_refused(tmp_path):
    """As DeepSpeed 0.17 to 0.19.3 leave them."""
    model = load_causal_lm(save_tiny(tmp_path), torch.bfloat16)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    with pytest.raises(UserError, match=r"rotary_emb.inv_freq is torch.bfloat16 .* install deepspeed 0.19.4"):
        require_exact_rotary(model, tmp_path)
