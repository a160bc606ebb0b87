"""What stays of tiny models, drawn; written, and read again."""

import torch
from hypothesis import strategies as st
from tiny import SHAPE, VARIANTS

from hfprune_dist.checkpoints.pruned_config import pruned_config, read_kept
from hfprune_dist.checkpoints.write_pruned import write_companions, write_weight_file
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.layout import axis_of, kind_of_axis

HIDDEN = SHAPE["hidden_size"]
# What stays of two layers: other neurons in each, other numbers of KV groups, and one group of each.
WIDTHS = {"neurons": [torch.arange(32), torch.arange(3, 41)]}
HEADS = {"kv_groups": [torch.tensor([1]), torch.tensor([0, 1])]}
FEWER = {"kv_groups": [torch.tensor([1]), torch.tensor([0])]}


@st.composite
def models(draw, **fixed):
    """Draw arguments of ``save_tiny``: a variant with some number of heads, layers and neurons."""
    variant = draw(st.sampled_from(list(VARIANTS)))
    options = {
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(2, 12)),
        "num_key_value_heads": (groups := draw(st.integers(1, 5))),
        "num_attention_heads": (heads := groups * draw(st.integers(1, 4))),
        "head_dim": draw(st.sampled_from([2, 4, 8])),
    }
    if variant.startswith("llama") and HIDDEN % heads:
        options |= {"num_key_value_heads": 4, "num_attention_heads": draw(st.sampled_from([4, 8]))}
    if variant == "qwen2":  # its modules read head_dim if config.json has one
        options["num_attention_heads"] = options["num_key_value_heads"] * draw(st.integers(1, 4))
    if variant == "qwen3":
        options["attention_bias"] = draw(st.booleans())
    if variant.startswith("qwen") and draw(st.booleans()):
        window = {"use_sliding_window": True, "sliding_window": 4}
        options |= window | {"max_window_layers": draw(st.integers(0, options["num_hidden_layers"]))}
    return {"variant": variant, **options, **fixed}


def some(draw, count, size=None):
    """Draw ascending numbers below ``count``, at least one of them; ``size`` is how many."""
    size = draw(st.integers(1, count)) if size is None else size
    return sorted(draw(st.permutations(range(count)))[:size])


@st.composite
def kept_of(draw, model, *, uniform, layers=True):
    """Draw what stays of such a model: some units of some kinds, in all layers or some."""
    count = model["num_hidden_layers"]
    staying = some(draw, count) if layers else list(range(count))
    sizes = {"neurons": model["intermediate_size"], "kv_groups": model["num_key_value_heads"]}
    units = {}
    for kind in draw(st.sets(st.sampled_from(sorted(sizes)), min_size=0 if layers else 1)):
        size = draw(st.integers(1, sizes[kind])) if uniform else None
        units[kind] = [torch.tensor(some(draw, sizes[kind], size)) for _ in staying]
    return Kept(tuple(staying), units)


def write(checkpoint, kept, target, replacements=None):
    """Write a checkpoint as the prune stage does."""
    target.mkdir(exist_ok=True)
    for file in checkpoint.weight_files:
        write_weight_file(checkpoint, file, kept, target, replacements)
    write_companions(checkpoint, target, pruned_config(checkpoint, kept.shape))


def kept_by_kind(folder):
    """Return the layers in a folder's ``kept.json``, and kind -> the units of each of them."""
    axes = read_kept(folder)
    layers = axes.pop("layers")
    kinds = sorted({kind_of_axis(axis)[1] for axis in axes})
    return {"layers": layers, **{kind: [axes.get(axis_of(layer, kind), []) for layer in layers] for kind in kinds}}


def kept_in(folder):
    """Return what a folder's ``kept.json`` says."""
    units = kept_by_kind(folder)
    layers = tuple(units.pop("layers"))
    return Kept(layers, {kind: [torch.tensor(row, dtype=torch.int64) for row in rows] for kind, rows in units.items()})
