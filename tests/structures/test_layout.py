"""Axes of tiny models: counts against models of the smaller sizes, and cuts along any of them together."""

import pytest
import torch
from families import MIXTURES, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import COUNT, some_kept
from tiny import VARIANTS, save_tiny, tiny_model

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.write_pruned import staying
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.layout import HIDDEN, VOCABULARY, axis_of, kind_of_axis


@settings(max_examples=10)
@given(st.data(), st.sampled_from(sorted(VARIANTS)))
def test_sizes_that_multiply_are_cut_and_counted_together(tmp_path_factory, data, variant):
    """Hidden size and vocabulary, beside layers, neurons and KV groups."""
    dense = open_checkpoint(save_tiny(tmp_path_factory.mktemp("dense"), variant, head_dim=8, num_hidden_layers=3))
    left = {axis: data.draw(st.integers(3, size)) for axis, size in ((VOCABULARY, 264), ("neurons", 48))}
    left |= {HIDDEN: 4 * data.draw(st.integers(1, 8)), "kv_groups": data.draw(st.integers(1, 2))}
    units = {kind: [torch.arange(left[kind])] * 2 for kind in ("neurons", "kv_groups")}
    kept = Kept((0, 2), units, whole={axis: torch.arange(left[axis]) for axis in (HIDDEN, VOCABULARY)})
    shapes = {new: cut.shape(dense.tensors[name].shape) for name, (new, cut) in staying(dense, kept).items()}
    sizes = {"vocab_size": left[VOCABULARY], "hidden_size": left[HIDDEN], "intermediate_size": left["neurons"]}
    heads = {"num_key_value_heads": left["kv_groups"], "num_attention_heads": 2 * left["kv_groups"], "head_dim": 8}
    smaller = tiny_model(variant, num_hidden_layers=2, **sizes, **heads)
    assert shapes == {name: tuple(weight.shape) for name, weight in smaller.named_parameters()}
    assert dense.parameter_counts.after(kept.shape) == smaller.num_parameters()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_neurons_of_experts_go_together_with_experts(tmp_path, model_type):
    dense = open_checkpoint(save_model(tmp_path, model_type, **MIXTURES[model_type]))
    neurons, rows = some_kept(dense, 2 / 3), torch.tensor([0, 2])
    axis, whole = dense.structures["expert_neurons"], [rows if count else rows[:0] for count in dense.units.counts]
    of_both = [row.view(COUNT, -1)[rows].flatten() if len(row) else row for row in neurons.units[axis.kind]]
    kept = Kept(neurons.layers, {**neurons.units, axis.kind: of_both, "experts": whole})
    found = staying(dense, kept)
    sizes = {new: cut.shape(dense.tensors[name].shape) for name, (new, cut) in found.items()}
    total = sum(torch.Size(shape).numel() for shape in sizes.values())
    assert dense.parameter_counts.after(kept.shape) == total < dense.parameter_counts.after(neurons.shape)


def test_the_axis_of_a_kind_has_its_name_and_experts_neurons_lie_inside_experts():
    assert axis_of(3, "kv_groups") == "layers.3.kv_groups" and kind_of_axis("layers.3.kv_groups") == (3, "kv_groups")
    assert axis_of(0, "expert_neurons") == "layers.0.experts.neurons"
    assert kind_of_axis("layers.0.experts.neurons") == (0, "expert_neurons")
