"""A checkpoint's decoder, one layer at a time: memory for one layer, whatever the model's size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.modeling_pruned import add_output_biases, config_of_layer, factorize
from hfprune_dist.checkpoints.read_tensors import read_tensor
from hfprune_dist.core.fidelity import Outputs
from hfprune_dist.core.selection import entries_of
from hfprune_dist.models.loading import ONE_AT_A_TIME
from hfprune_dist.structures.units import Units

# Of the only layer inside what ``LayerReader.layer`` makes.
LAYER = "layers.0"


@dataclass(frozen=True)
class Head:
    """The end of a model: final norm, and the projection to the vocabulary."""

    norm: nn.Module
    weight_VC: Tensor
    bias_V: Tensor | None

    def outputs(self, hidden_BTC: Tensor) -> Outputs:
        """From what the last layer puts out."""
        return Outputs(self.norm(hidden_BTC).flatten(0, 1), self.weight_VC, self.bias_V)


class LayerReader:
    """Makes the layers of a checkpoint, each as a decoder that has this layer alone and no final norm.

    So a layer sees the masks and positions that its architecture makes for it.

    Args:
        dtype: of weights and activations.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._config: Any = AutoConfig.from_pretrained(checkpoint.path)

    def embed(self, batches: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """What the first layer reads, for micro-batches of ids [windows, tokens]: [windows, tokens, hidden_size] each,
        on the CPU.
        """
        table_VC = read_tensor(self._checkpoint, self._checkpoint.family.embedding_tensor()).to(self._dtype)
        return {index: nn.functional.embedding(ids_BT, table_VC) for index, ids_BT in batches.items()}

    def layer(self, number: int) -> nn.Module:
        """The decoder of one layer; call it through ``run``."""
        return self.with_weights(number, self.weights(number, self._placed))

    def weights(self, number: int, place: Callable[[Tensor, torch.dtype], Tensor]) -> dict[str, Tensor]:
        """A layer's weights for ``with_weights``. Threads may read different layers at once.

        Args:
            place: puts what a file has onto the device, in a dtype.
        """
        prefix = f"{self._checkpoint.family.layers}.{number}."
        return {
            f"{LAYER}.{name.removeprefix(prefix)}": place(read_tensor(self._checkpoint, name), self._dtype)
            for name in self._checkpoint.tensors
            if name.startswith(prefix)
        }

    def with_weights(self, number: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """``layer``, of which the weights were read before."""
        family = self._checkpoint.family
        with ONE_AT_A_TIME, torch.device("meta"):
            config = self._layer_config(number)
            model = AutoModelForCausalLM.from_config(config, dtype=self._dtype, attn_implementation="sdpa")
            body: nn.Module = family.body_of(model)
            factorize(body.get_submodule(f"{LAYER}.{family.attention}"), config)
            add_output_biases(self._config, family.layers_of(model)[0])
        body.norm = nn.Identity()
        body.embed_tokens = None  # type: ignore[assignment]
        body.rotary_emb = type(body.rotary_emb)(body.config)  # its buffers are computed, not read
        body.load_state_dict(weights, strict=False, assign=True)
        missing = [name for name, parameter in body.named_parameters() if parameter.is_meta]
        assert not missing, f"layer {number}: the checkpoint lacks {missing}"
        return body.to(self._device).requires_grad_(False).eval()

    def head(self) -> Head:
        """What turns the last layer's output into logits."""
        family, names = self._checkpoint.family, self._checkpoint.tensors
        weight = family.head_tensor()
        bias = f"{family.head}.bias"
        return Head(
            self.final_norm(),
            self._read(weight if weight in names else family.embedding_tensor()),  # else tied to the embedding
            self._read(bias) if bias in names else None,
        )

    def final_norm(self) -> nn.Module:
        """Between the last layer and the head."""
        family = self._checkpoint.family
        with ONE_AT_A_TIME, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._layer_config(0), dtype=self._dtype)
        norm: nn.Module = model.get_submodule(family.norm)
        norm.load_state_dict({"weight": self._read(family.norm_tensor())}, assign=True)
        return norm.requires_grad_(False)

    def _read(self, name: str) -> Tensor:
        return self._placed(read_tensor(self._checkpoint, name), self._dtype)

    def _placed(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self._device, dtype)

    def _layer_config(self, number: int) -> Any:
        config = copy.deepcopy(config_of_layer(self._config, number))
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number]]
        config.use_cache = False
        return config


@torch.no_grad()
def run(layer: nn.Module, hidden_BTC: Tensor) -> Tensor:
    """One layer's output, same shape."""
    output_BTC: Tensor = layer(inputs_embeds=hidden_BTC, use_cache=False).last_hidden_state
    return output_BTC


class _Reached(Exception):  # noqa: N818  no error: it ends a computation that has done what it was run for
    """Carries what a module was to read."""

    def __init__(self, input_BTC: Tensor) -> None:
        self.input_BTC = input_BTC


@torch.no_grad()
def input_of(module: nn.Module, compute: Callable[[], object]) -> Tensor:
    """What a module reads in a computation, of which nothing is computed from there on.

    Args:
        compute: runs the module, and what comes before it. It is left by an exception that a hook raises.
    """

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    handle = module.register_forward_pre_hook(stop)
    try:
        compute()
    except _Reached as reached:
        return reached.input_BTC
    finally:
        handle.remove()
    raise AssertionError("the computation is over, and the module was not run")


def mlp_of(layer: nn.Module) -> nn.Module:
    """The MLP inside what ``LayerReader.layer`` made."""
    return layer.get_submodule(f"{LAYER}.mlp")


def projection(mlp: nn.Module, name: str) -> nn.Linear:
    """One of an MLP's projections, by its family's name for it."""
    return cast("nn.Linear", mlp.get_submodule(name))


def part_of(layer: nn.Module, name: str) -> nn.Module:
    """A module of such a layer, by its name within it."""
    return layer.get_submodule(f"{LAYER}.{name}")


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """A projection of such a layer, by its name within it."""
    return cast("nn.Linear", part_of(layer, name))


def output_of(layer: nn.Module, units: Units) -> nn.Linear:
    """The output projection of such a layer, which reads the units' channels."""
    return linear_of(layer, units.output)


def weights_kept(layer: nn.Module, units: Units, kept: Tensor | None = None) -> dict[str, Tensor]:
    """What is left of every parameter that units own something of, by its name within the layer.

    Args:
        kept: ascending int64 indices of the units that stay; None: all.
    """
    found = dict(layer.get_submodule(LAYER).named_parameters())
    owned = [it for it in units.owned if it.tensor in found]
    if kept is None:
        return {it.tensor: found[it.tensor].data for it in owned}
    kept = kept.to(found[owned[0].tensor].device)
    return {it.tensor: found[it.tensor].data.index_select(it.axis, entries_of(kept, it.per_unit)) for it in owned}


def put_weights(layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give such a layer's parameters, by their names within the layer, other values; sizes may differ."""
    for name, weight in weights.items():
        layer.get_parameter(f"{LAYER}.{name}").data = weight
