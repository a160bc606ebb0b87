"""A checkpoint's decoder, one layer at a time: memory for one layer, whatever the model's size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.layer_settings import of_layers
from hfprune_dist.checkpoints.modeling_pruned import add_output_biases, config_of_layer, factorize
from hfprune_dist.checkpoints.module_tensors import module_tensors
from hfprune_dist.checkpoints.read_tensors import read_module_tensor, read_tensor
from hfprune_dist.core.fidelity import Outputs
from hfprune_dist.core.head import AfterHead
from hfprune_dist.core.selection import entries_of
from hfprune_dist.models.after_head import after_head
from hfprune_dist.models.loading import ONE_AT_A_TIME, attention_of, auto_class, stays_float32
from hfprune_dist.models.memory_efficient_backward import SILU
from hfprune_dist.structures.units import Units

# Of the only layer inside what ``LayerReader.layer`` makes.
LAYER = "layers.0"


@dataclass(frozen=True)
class Head:
    """The end of a model: final norm, the projection to the vocabulary, and what becomes of its logits."""

    norm: nn.Module
    weight_VC: Tensor
    bias_V: Tensor | None
    after: AfterHead

    def outputs(self, hidden_BTC: Tensor) -> Outputs:
        """From what the last layer puts out."""
        return Outputs(self.norm(hidden_BTC).flatten(0, 1), self.weight_VC, self.bias_V, self.after)


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
        table = self._checkpoint.family.embedding_tensor()
        body = self._body(0).eval()  # some drop embeddings out
        body.load_state_dict({**self._beside(), **self._read_within([table])}, strict=False, assign=True)
        first = body.get_submodule(LAYER)
        return {
            index: input_of(first, partial(body, input_ids=ids_BT, use_cache=False))
            for index, ids_BT in batches.items()
        }

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
            f"{LAYER}.{name.removeprefix(prefix)}": place(
                read_module_tensor(self._checkpoint, made), self._dtype_of(name)
            )
            for name, made in module_tensors(self._checkpoint, number).items()
        }

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if stays_float32(self._checkpoint, name) else self._dtype

    def with_weights(self, number: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """``layer``, of which the weights were read before."""
        family = self._checkpoint.family
        body = self._body(number)
        body.set_submodule(_within(family.body, family.norm), nn.Identity())
        body.set_submodule(_within(family.body, family.embedding), nn.Identity())
        body.load_state_dict({**self._beside(), **weights}, strict=False, assign=True)
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
            after_head(self._checkpoint),
        )

    def final_norm(self) -> nn.Module:
        """Between the last layer and the head."""
        family = self._checkpoint.family
        norm: nn.Module = self._model(0).get_submodule(family.norm)
        norm.load_state_dict({name: self._read(f"{family.norm}.{name}") for name in norm.state_dict()}, assign=True)
        return norm.requires_grad_(False)

    def _beside(self) -> dict[str, Tensor]:
        """What the decoder has beside its layers, its embeddings and its final norm: positions, if any."""
        family = self._checkpoint.family
        others = (f"{family.layers}.", f"{family.embedding}.", f"{family.norm}.")
        names = [name for name in self._checkpoint.tensors if name.startswith(f"{family.body}.")]
        return self._read_within([name for name in names if not name.startswith(others)])

    def _read_within(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names within the decoder, on the CPU."""
        body = self._checkpoint.family.body
        return {_within(body, name): read_tensor(self._checkpoint, name).to(self._dtype) for name in names}

    def _body(self, number: int) -> nn.Module:
        """The decoder of one layer, whose parameters have no values yet."""
        model = self._model(number)
        body: nn.Module = self._checkpoint.family.body_of(model)
        for module in body.modules():
            _compute_buffers(model, module)
        return body

    def _model(self, number: int) -> Any:
        config = self._layer_config(number)
        with ONE_AT_A_TIME, torch.device("meta"):
            model = auto_class(self._checkpoint).from_config(
                config, dtype=self._dtype, attn_implementation=attention_of(self._checkpoint)
            )
            (layer,) = self._checkpoint.family.layers_of(model)
            factorize(layer, config.get_text_config())
            add_output_biases(config.get_text_config(), layer)
        return model

    def _read(self, name: str) -> Tensor:
        return self._placed(read_tensor(self._checkpoint, name), self._dtype)

    def _placed(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self._device, dtype)

    def _layer_config(self, number: int) -> Any:
        text = self._config.get_text_config()
        own = copy.deepcopy(config_of_layer(text, number))
        for key, value in of_layers(vars(own), [number]).items():
            setattr(own, key, value)
        own.use_cache = False
        if text is self._config:
            return own
        whole = copy.copy(self._config)
        whole.text_config = own
        return whole


def _within(body: str, name: str) -> str:
    """A module's name within the decoder."""
    return name.removeprefix(f"{body}.")


def _compute_buffers(model: Any, module: nn.Module) -> None:
    """Buffers, as they are before weights are loaded, some of buffers among them: those of rotary embeddings from their
    configuration, others as transformers does it.
    """
    buffers = {name: it for name, it in module.named_buffers(recurse=False) if it.is_meta}
    if not buffers:
        return
    for name, buffer in buffers.items():
        in_files = name not in module._non_persistent_buffers_set
        module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=in_files)
    model._init_weights(module)


@torch.no_grad()
def run(layer: nn.Module, hidden_BTC: Tensor) -> Tensor:
    """One layer's output, same shape."""

    def enter(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (hidden_BTC, *inputs[1:])  # whatever the decoder does to embeddings before its first layer

    handle = layer.get_submodule(LAYER).register_forward_pre_hook(enter)
    try:
        output_BTC: Tensor = layer(inputs_embeds=hidden_BTC, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    return output_BTC


class _Reached(Exception):  # noqa: N818  no error: it ends a computation that has done what it was run for
    """Carries what a module was to read."""

    def __init__(self, input_BTC: Tensor) -> None:
        self.input_BTC = input_BTC


def read_by(inputs: tuple[Tensor, ...], options: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments of a module."""
    hidden: Tensor = inputs[0] if inputs else options["hidden_states"]
    return hidden


@torch.no_grad()
def input_of(module: nn.Module, compute: Callable[[], object]) -> Tensor:
    """What a module reads in a computation, of which nothing is computed from there on.

    Args:
        compute: runs the module, and what comes before it. It is left by an exception that a hook raises.
    """

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...], options: Mapping[str, Any]) -> None:
        raise _Reached(read_by(inputs, options))

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        compute()
    except _Reached as reached:
        return reached.input_BTC
    finally:
        handle.remove()
    raise AssertionError("the computation is over, and the module was not run")


def mlp_of(layer: nn.Module, units: Units) -> nn.Module:
    """The MLP that some units are of, inside what ``LayerReader.layer`` made."""
    return layer.get_submodule(f"{LAYER}.{units.block.name}")


def entering(layer: nn.Module, units: Units) -> nn.Module:
    """Of such a layer, what makes of the residual stream what the units' block reads."""
    norm = units.block.norm
    return nn.Identity() if norm is None else part_of(layer, norm)


@torch.no_grad()
def added(layer: nn.Module, units: Units, output_BTC: Tensor) -> Tensor:
    """What such a layer adds to its residual stream where the units' output projection puts this out."""
    block = units.block
    if block.norm_after is not None:
        output_BTC = part_of(layer, block.norm_after)(output_BTC)
    return output_BTC if block.multiplier == 1.0 else output_BTC * block.multiplier


def put_out(layer: nn.Module, units: Units, wanted_NC: Tensor, like_NC: Tensor) -> Tensor:
    """What the units' output projection should put out for this to be added to the residual stream.

    A norm that follows it divides by each token's size, which is taken from another output.

    Args:
        wanted_NC: float32 [tokens, hidden_size].
        like_NC: what it puts out now, or nearly [tokens, hidden_size].
    """
    if units.block.norm_after is None and units.block.multiplier == 1.0:
        return wanted_NC
    sizes_NC = like_NC.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12).expand_as(wanted_NC)
    scale_NC = added(layer, units, sizes_NC.to(like_NC.dtype)).float() / sizes_NC
    return wanted_NC / scale_NC.where(scale_NC.abs() > 1e-6, torch.inf)


@dataclass(frozen=True)
class BeforeDown:
    """What an MLP computes with before its down projection.

    Attributes:
        weights, biases: of gate and up, or of up alone.
        activation: of the first of them.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activation: Callable[[Tensor], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype


def before_down(layer: nn.Module, units: Units) -> BeforeDown:
    """Of such a layer, by the neurons of its MLP."""
    mlp = mlp_of(layer, units)
    rows, weights = _rows(layer, units), row_matrices(layer, units)
    biases = [part for row in rows if row.bias is not None for part in row.bias.data.chunk(units.row_parts[0])]
    acting = [it for it in mlp.children() if not isinstance(it, nn.Linear)]
    is_silu = not acting or isinstance(acting[0], SILU)
    activation = nn.functional.silu if is_silu else acting[0]
    return BeforeDown(weights, tuple(biases) or (None,) * len(weights), activation)


def row_matrices(layer: nn.Module, units: Units) -> tuple[Tensor, ...]:
    """Of such a layer, the matrices that make an MLP's neurons, gate and up or up alone [neurons, hidden_size]."""
    return tuple(part for row in _rows(layer, units) for part in row.weight.data.chunk(units.row_parts[0]))


def _rows(layer: nn.Module, units: Units) -> list[nn.Linear]:
    return [linear_of(layer, name.removesuffix(".weight")) for name in units.weights[:-1]]


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
    number = output_of(layer, units).in_features // units.channels_per_unit
    entries = {it.tensor: entries_of(kept, it.per_unit, it.parts, number) for it in owned}
    return {it.tensor: found[it.tensor].data.index_select(it.axis, entries[it.tensor]) for it in owned}


def put_weights(layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give such a layer's parameters, by their names within the layer, other values; sizes may differ."""
    for name, weight in weights.items():
        layer.get_parameter(f"{LAYER}.{name}").data = weight
