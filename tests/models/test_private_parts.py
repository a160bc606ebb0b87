"""Private parts of libraries that the package uses: a release that moves one is named here, with what needs it."""

import importlib
import inspect

import pytest
import torch
from transformers.integrations import moe
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from hfprune_dist.models import experts
from hfprune_dist.models.memory_efficient_backward import LlamaMLP, LlamaRMSNorm, _computes_as

# Module, and the part in it -> what uses it.
PARTS = {
    ("transformers.masking_utils", "find_packed_sequence_indices"): "models.loading tells which texts share a row",
    ("transformers", "PreTrainedModel._keep_in_fp32_modules_strict"): "models.loading keeps routers in float32",
    ("transformers", "PreTrainedModel._supports_sdpa"): "models.loading chooses the attention",
    ("transformers", "PreTrainedModel._init_weights"): "models.single_layer computes buffers",
    ("transformers.integrations.moe", "_grouped_linear"): "models.experts has transformers' bits and speed",
    ("transformers.integrations.moe", "_default_apply_gate"): "models.experts tells experts with gates of their own",
    ("torch", "nn.Module._non_persistent_buffers_set"): "models.single_layer tells buffers that are in files",
    ("torch.distributed.distributed_c10d", "_set_pg_timeout"): "distributed.zero3 shortens DeepSpeed's timeouts",
    ("torch.distributed.distributed_c10d", "_get_default_group"): "distributed.zero3 reads the ranks' timeout",
    ("torch.distributed.distributed_c10d", "_world.pg_map"): "distributed.zero3 finds DeepSpeed's process groups",
    ("lm_eval.tasks._index", "Kind"): "evaluation.lm_eval_tasks tells groups from tasks",
}


@pytest.mark.parametrize(("module", "part"), PARTS)
def test_every_part_is_where_it_was(module, part):
    found = importlib.import_module(module)
    for name in part.split("."):
        found = torch.nn.Module() if found is torch.nn.Module else found
        told = f"{module} has no {part} any more: {PARTS[module, part]}; find out what this release has in its place"
        assert hasattr(found, name), told
        found = getattr(found, name)


def test_masks_ask_which_texts_share_a_row():
    asking = inspect.getsource(importlib.import_module("transformers.masking_utils")._preprocess_mask_arguments)
    assert "find_packed_sequence_indices(position_ids)" in asking, "masks don't ask for what models.loading tells them"


def test_copies_of_llamas_code_are_known_as_such():
    told = (
        "their code differs in this release: models.memory_efficient_backward leaves them to autograd, which is slower"
    )
    assert all(_computes_as(kind.__new__(kind), LlamaMLP) for kind in (MistralMLP, Qwen2MLP)), told
    assert all(_computes_as(kind.__new__(kind), LlamaRMSNorm) for kind in (MistralRMSNorm, Qwen2RMSNorm)), told


@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize("ends", [[3, 3, 8], [0, 0, 8], [8, 8, 8]])
def test_without_transformers_product_experts_are_multiplied_one_by_one(monkeypatch, is_transposed, ends):
    generator = torch.Generator().manual_seed(0)
    x_SC, biases_SD = (torch.randn(8, width, generator=generator) for width in (16, 24))
    weights = torch.randn(3, *((16, 24) if is_transposed else (24, 16)), generator=generator)
    given = x_SC, weights, torch.tensor(ends, dtype=torch.int32), biases_SD, is_transposed
    expected = experts.product_by_experts(*given)
    monkeypatch.delattr(moe, "_grouped_linear")
    torch.testing.assert_close(experts.product_by_experts(*given), expected, rtol=1e-5, atol=1e-5)
