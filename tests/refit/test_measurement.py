"""Divergences of candidates: against whole models, on any number of ranks, and if outputs are not numbers."""

import pytest
import torch
from ranks import SoloWorld
from refitting import checkpoint_in, windows_of
from transformers import AutoModelForCausalLM
from worlds import Ranks

from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import LAYER
from hfprune_dist.refit.measurement import Measurement, dense_outputs, one_by_one

DOWN = "mlp.down_proj.weight"


class Scaled:
    """``Variants`` in which a choice is the number by which a down projection is multiplied."""

    def weights(self, _number, layer, choices):
        weight_CK = layer.get_parameter(f"{LAYER}.{DOWN}").data
        return {choice: {DOWN: weight_CK * choice[0]} for choice in choices}


def measured(checkpoint, candidates, world, dtype=torch.float32):
    batches, passed = one_by_one(windows_of(3)), []
    measurement = Measurement(
        checkpoint,
        Scaled,
        batches,
        reference=lambda: dense_outputs(checkpoint, batches, dtype, world, lambda _done: None),
        dtype=dtype,
        world=world,
        after_each=passed.append,
    )
    kls = measurement.kl(candidates)
    assert measurement.kl(candidates[:2]) == kls[:2], "known"
    assert passed == list(range(1, checkpoint.num_layers + 1))
    return kls


def by_whole_models(checkpoint, candidates):
    models = [AutoModelForCausalLM.from_pretrained(checkpoint.path) for _ in range(len(candidates) + 1)]
    for model, candidate in zip(models[1:], candidates, strict=True):
        for layer, choice in zip(model.model.layers, candidate, strict=True):
            layer.mlp.down_proj.weight.data *= 1 if choice is None else choice[0]
        staying = [layer for layer, choice in zip(model.model.layers, candidate, strict=True) if choice is not None]
        model.model.layers = torch.nn.ModuleList(staying)
        model.config.num_hidden_layers = len(staying)
    with torch.no_grad():
        dense, *others = (model(windows_of(3), use_cache=False).logits.log_softmax(-1) for model in models)
    return [(dense.exp() * (dense - it)).sum(-1).mean().item() for it in others]


@pytest.mark.parametrize("ranks", [1, 2])
def test_candidates_diverge_as_whole_models_do(tmp_path, ranks):
    checkpoint = checkpoint_in(tmp_path / "model")
    candidates = [((1,), (1,), (1,)), (None, (1,), (0,)), ((1,), (2,), None), ((1,), (2,), (3,))]
    expected = by_whole_models(checkpoint, candidates)
    for kls in Ranks(ranks).run(lambda world: measured(checkpoint, candidates, world)):
        assert kls == pytest.approx(expected, rel=1e-3, abs=1e-6) and min(kls[1:]) > 1e-4


def test_a_shape_whose_outputs_are_nan_is_one_message(tmp_path):
    checkpoint = checkpoint_in(tmp_path / "model", layers=2)
    with pytest.raises(UserError, match=r"1 of 2 shapes .* NaN or infinite in torch.bfloat16; .*dtype=float32"):
        measured(checkpoint, [((1,), (1,)), ((1,), (float("nan"),))], SoloWorld(), torch.bfloat16)
