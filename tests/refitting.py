"""Refits of tiny models that lose neurons, KV groups and layers, and the same by whole layers in float64."""

import mixtures
import torch
from families import MIXTURES, save_model
from safetensors.torch import load_file
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core.gram import ridge_of
from hfprune_dist.core.least_squares import RIDGES
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.sums import is_held_out
from hfprune_dist.models.single_layer import LayerReader, part_of, run
from hfprune_dist.refit.output_refit import refit_on_dense
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.structures.kept import Kept

KINDS = "neurons", "kv_groups"
GROUPS, QUERIES, NEURONS = 4, 2, 24
MICRO_BATCH = 2
O_PROJ, DOWN = "self_attn.o_proj", "mlp.down_proj"


def checkpoint_in(folder, variant="llama", layers=3):
    heads = {"num_key_value_heads": GROUPS, "num_attention_heads": GROUPS * QUERIES}
    biases = {"attention_bias": True} if variant == "qwen3" else {}
    sizes = {"intermediate_size": NEURONS, "num_hidden_layers": layers}
    return open_checkpoint(save_tiny(folder, variant, **heads, **sizes, **biases))


def to_prune(folder, variant, layers, **of_mixture):
    """Return a checkpoint and what stays of it: some units of these layers, or of each MLP in a mixture of
    experts of its usual or other sizes."""
    if variant in MIXTURES:
        checkpoint = open_checkpoint(save_model(folder, variant, vocab_size=264, **of_mixture))
        return checkpoint, mixtures.some_kept(checkpoint, 2 / 3)
    return checkpoint_in(folder, variant, layers[-1] + 1), some_kept(layers)


def windows_of(count, seed=0, tokens=20):
    return torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(seed))


def some_kept(layers):
    """Keep some units of every kind in these layers, but all groups of the last layer."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count, size):
        return torch.randperm(count, generator=generator)[:size].sort().values

    units = {
        "neurons": [drawn(NEURONS, 11 + layer) for layer in layers],
        "kv_groups": [drawn(GROUPS, GROUPS if layer == layers[-1] else 1 + layer % 3) for layer in layers],
    }
    return Kept(tuple(layers), units)


def nothing(_done):
    pass


def refit(method, checkpoint, kept, folder, **options):
    """Refit what stays, as the prune stage does, and return where the refitted layers are.

    Args:
        options: ``world``, ``windows_ST``, ``dtype``, ``micro_batch_size``, ``merged``, ``stay`` and ``after_each``.
    """
    where = options["windows_ST"], options.get("dtype", torch.float32), options.get("micro_batch_size", MICRO_BATCH)
    fitted, kinds = RefittedLayers(checkpoint, folder), [checkpoint.structures[kind] for kind in kept.units]
    how = {name: options[name] for name in ("merged", "stay") if name in options}
    streams = [LayerStream(checkpoint, *where, options["world"], **how) for _ in range(1 + (method != "dense"))]
    after_each = options.get("after_each", nothing)
    if method == "dense":
        refit_on_dense(kept, kinds, *streams, fitted, after_each)
    else:
        iterations = (2, 2) if method == "block" else None
        SequentialRefit(kept, kinds, *streams, fitted, iterations=iterations).run(after_each)
    return fitted


def weights_in(folder):
    return {file.name: file.read_bytes() for file in folder.glob("layer-*")}


def assert_alike(fitted, expected, layers):
    """Check that refitted weights are those of another number of ranks, up to rounding."""
    ours, theirs = (
        {name: read().double() for name, read in model.replacements(layers).items()} for model in (fitted, expected)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def found(folder, number, name):
    """Return a refitted weight."""
    return load_file(folder / f"layer-{number}.safetensors")[f"model.layers.{number}.{name}.weight"].double()


def in_files(files, units, number, expert):
    """Return the output projection of an expert or single MLP [hidden_size, kept], from tensors as files have them."""
    name, place, _ = units.owned[-1]
    if "{}" in name or units.experts == 1:
        return files[units.tensor(number, name.format(expert))]
    matrix = files[units.tensor(number, name)][expert]
    return matrix if place == 2 else matrix.T


def columns(kept, number, kind, per_unit):
    """Return the channels of an output projection that stay."""
    return (kept.of_layer(number, kind)[:, None] * per_unit + torch.arange(per_unit)).flatten()


def pruned_layer(reader, number, kept):
    """Return a layer cut by hand, without what goes."""
    layer = reader.layer(number)
    attention, mlp = part_of(layer, "self_attn"), part_of(layer, "mlp")
    head_dim = attention.head_dim
    groups, neurons = kept.of_layer(number, "kv_groups"), kept.of_layer(number, "neurons")
    own = columns(kept, number, "kv_groups", head_dim)
    queries = (groups[:, None] * QUERIES * head_dim + torch.arange(QUERIES * head_dim)).flatten()
    rows = [(attention.q_proj, queries), (attention.k_proj, own), (attention.v_proj, own)]
    for linear, staying in [*rows, (mlp.gate_proj, neurons), (mlp.up_proj, neurons)]:
        linear.weight.data = linear.weight.data[staying]
        if linear.bias is not None:
            linear.bias.data = linear.bias.data[staying]
    attention.o_proj.weight.data = attention.o_proj.weight.data[:, queries]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, neurons]
    return layer


def inside(layer, hidden_BTC):
    """Return what goes into some modules of a layer and out of them, and out of the layer, by name; [tokens, ...]."""
    seen = {}

    def hook(name):
        def keep(_module, inputs, output):
            first = inputs[0] if inputs else None
            seen[name] = first, output

        return keep

    names = "input_layernorm", O_PROJ, "post_attention_layernorm", DOWN
    handles = [part_of(layer, name).register_forward_hook(hook(name)) for name in names]
    seen["output"] = run(layer, hidden_BTC)
    for handle in handles:
        handle.remove()
    return seen


def embedded(checkpoint, windows_ST):
    """Return a reader of the checkpoint's layers in float64, and the first layer's input."""
    reader = LayerReader(checkpoint, torch.float64, torch.device("cpu"))
    return reader, reader.embed({0: windows_ST})[0]


def ridge_regression(weight, hidden, targets, ridge):
    """Return weights near ``weight`` that map ``hidden`` to ``targets``, by QR of the stacked problem."""
    pull = ridge_of(ridge, hidden.square().sum(0), weight.square().sum(0)).sqrt()
    rows = torch.cat([hidden, pull.diag().double()])
    missing = targets - hidden @ weight.T
    wanted = torch.cat([missing, torch.zeros(hidden.shape[1], len(weight)).double()])
    return weight + torch.linalg.lstsq(rows, wanted).solution.T


def best_ridge_regression(weight, hidden_BTK, targets_BTC):
    """Return the weights for the ridge that is the best on held-out windows, fitted on all."""
    errors = held_out_errors(RIDGES, weight, hidden_BTK, targets_BTC)
    return ridge_regression(weight, hidden_BTK.flatten(0, 1), targets_BTC.flatten(0, 1), min(RIDGES, key=errors.get))


def apart(rows_BTD):
    """Return the windows that are fitted and the windows that are held out [tokens, ...]."""
    count = -(-len(rows_BTD) // MICRO_BATCH)
    held_out = torch.tensor([is_held_out(row // MICRO_BATCH, count) for row in range(len(rows_BTD))])
    return rows_BTD[~held_out].flatten(0, 1), rows_BTD[held_out].flatten(0, 1)


def held_out_errors(ridges, weight, hidden_BTK, targets_BTC):
    """Ridge -> squared error on the held-out windows of weights fitted on all others, as a share of the targets."""
    (hidden, unseen_hidden), (targets, unseen_targets) = apart(hidden_BTK), apart(targets_BTC)
    missed = {
        ridge: (unseen_hidden @ ridge_regression(weight, hidden, targets, ridge).T - unseen_targets).square().sum()
        for ridge in ridges
    }
    return {ridge: float(error / unseen_targets.square().sum()) for ridge, error in missed.items()}
