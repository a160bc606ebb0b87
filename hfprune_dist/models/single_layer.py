"""A checkpoint's decoder, one layer at a time: memory for one layer, whatever the model's size.

In functions, a ``layer`` is a decoder with only one, as ``LayerReader.layer`` makes it, and names are those within it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.layer_settings import renumbered
from hfprune_dist.checkpoints.modeling_pruned import add_output_biases, config_of_layer, factorize
from hfprune_dist.checkpoints.read_tensors import open_weights, read_module_tensor, read_tensor
from hfprune_dist.checkpoints.stored_names import module_tensors
from hfprune_dist.core.devices import send
from hfprune_dist.core.gauss_newton import Biases
from hfprune_dist.core.head import AfterHead, Outputs
from hfprune_dist.core.selection import entries_of
from hfprune_dist.errors import UserError
from hfprune_dist.models.loading import (
    ONE_AT_A_TIME,
    after_head,
    attention_of,
    auto_class,
    name_outputs,
    packed_rows,
    stays_float32,
)
from hfprune_dist.models.memory_efficient_backward import SILU
from hfprune_dist.structures.units import Units

# Name of the only layer in a decoder of one.
LAYER = "layers.0"
# What a decoder is made from -> the decoder without values, of which copies take a quarter of the time.
_MADE: dict[str, nn.Module] = {}
# The gate of MLPs that apply SiLU without having a module for it (lfm2, lfm2_moe, lfm3).
_GATE_OF_SILU = ".w1.weight"


@dataclass(frozen=True)
class Head:
    """The end of a model: the final norm, the projection to the vocabulary, and what is done to the logits."""

    norm: nn.Module
    weight_VC: Tensor
    bias_V: Tensor | None
    after: AfterHead

    def outputs(self, normed_BTC: Tensor) -> Outputs:
        """The model's outputs, given what ``norm`` puts out."""
        return Outputs(normed_BTC.flatten(0, 1), self.weight_VC, self.bias_V, self.after)


class LayerReader:
    """Makes the layers of a checkpoint, each as a decoder with only this layer and no final norm.

    So each layer sees the masks and positions that its architecture makes for it.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._checkpoint = checkpoint
        self._config: Any = AutoConfig.from_pretrained(checkpoint.path)

    def embed(self, batches: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The first layer's inputs [windows, tokens, hidden_size] for batches of ids [windows, tokens]; on the CPU."""
        table = self._checkpoint.family.embedding_tensor
        body = self._empty(0).eval()  # some apply dropout to embeddings
        body.load_state_dict({**self._beside(), **self._read_within([table])}, strict=False, assign=True)
        first = body.get_submodule(LAYER)
        return {
            index: input_of(first, partial(body, input_ids=ids_BT, use_cache=False))
            for index, ids_BT in batches.items()
        }

    def layers(self, numbers: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
        """Yield layers with their numbers; drop each before asking for the next. While a GPU works on one, a thread
        reads the next one's weights into pinned memory.
        """
        if self.device.type != "cuda":
            for number in numbers:
                yield number, self.layer(number)
            return
        waiting = list(numbers)
        # The thread would use the first GPU if it weren't told which.
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(self.device,)) as thread:
            coming = [thread.submit(self._weights, number) for number in waiting[:1]]
            for place, number in enumerate(waiting, start=1):
                weights = coming.pop().result()
                coming += [thread.submit(self._weights, following) for following in waiting[place : place + 1]]
                yield number, self._with_weights(number, weights)

    def layer(self, number: int) -> nn.Module:
        """The decoder of one layer; call it through ``run``."""
        return self._with_weights(number, self._weights(number))

    def _weights(self, number: int) -> dict[str, Tensor]:
        """A layer's weights by their names in the decoder, in main memory, pinned for a GPU."""
        weights, checkpoint = {}, self._checkpoint
        with open_weights(checkpoint) as read:
            for name, sources in module_tensors(checkpoint, number).items():
                dtype = torch.float32 if stays_float32(checkpoint, name) else self.dtype
                weight = read_module_tensor(read, sources).to(dtype)
                within = name.removeprefix(f"{checkpoint.family.layers}.{number}.")
                weights[f"{LAYER}.{within}"] = weight.pin_memory() if self.device.type == "cuda" else weight
        return weights

    def _with_weights(self, number: int, weights: Mapping[str, Tensor]) -> nn.Module:
        family = self._checkpoint.family
        body = self._empty(number)
        for outside in (family.norm, family.embedding):
            body.set_submodule(outside.removeprefix(f"{family.body}."), nn.Identity())
        body.load_state_dict({**self._beside(), **weights}, strict=False, assign=True)
        missing = [name for name, parameter in body.named_parameters() if parameter.is_meta]
        assert not missing, f"layer {number}: the checkpoint lacks {missing}"
        if self.device.type == "cuda":
            for buffer in body.buffers():  # or the host would wait for each
                buffer.data = buffer.pin_memory()
        return body.to(self.device, non_blocking=True).requires_grad_(False).eval()

    def _empty(self, number: int) -> nn.Module:
        """A decoder of one layer; its parameters are meta tensors, its buffers lie on the CPU."""
        text = self._config.get_text_config()
        own = config = copy.deepcopy(config_of_layer(text, number))
        for key, value in renumbered(vars(own), [number]).items():
            setattr(own, key, value)
        own.use_cache = False
        name_outputs(own)
        if text is not self._config:
            config = copy.copy(self._config)
            config.text_config = own
        recipe = str([self._checkpoint.family.plain_class, self.dtype, config.to_dict()])
        with ONE_AT_A_TIME:
            if recipe not in _MADE:
                _MADE[recipe] = _decoder(self._checkpoint, config, self.dtype)
        return copy.deepcopy(_MADE[recipe])

    def head(self) -> Head:
        """The part of the model that turns the last layer's output into logits."""
        family, names = self._checkpoint.family, self._checkpoint.tensors
        weight = family.head_tensor
        bias = f"{family.head}.bias"
        return Head(
            self.final_norm(),
            self._read(weight if weight in names else family.embedding_tensor),  # otherwise tied to the embedding
            self._read(bias) if bias in names else None,
            after_head(self._checkpoint),
        )

    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the head."""
        family = self._checkpoint.family
        return self._alone(0, family.norm.removeprefix(f"{family.body}."), family.norm)

    def norm_in_layer(self, number: int, name: str) -> nn.Module:
        """A norm of a layer, by its name within it."""
        return self._alone(number, f"{LAYER}.{name}", f"{self._checkpoint.family.layers}.{number}.{name}")

    def _alone(self, number: int, within: str, stored: str) -> nn.Module:
        """A module of the decoder of one layer, by its name there and its name in the checkpoint."""
        module = self._empty(number).get_submodule(within)
        module.load_state_dict({name: self._read(f"{stored}.{name}") for name in module.state_dict()}, assign=True)
        return module.requires_grad_(False)

    def _beside(self) -> dict[str, Tensor]:
        """The decoder's tensors outside its layers, embeddings and final norm: positions, if any."""
        family = self._checkpoint.family
        others = (f"{family.layers}.", f"{family.embedding}.", f"{family.norm}.")
        names = [name for name in self._checkpoint.tensors if name.startswith(f"{family.body}.")]
        return self._read_within([name for name in names if not name.startswith(others)])

    def _read_within(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names within the decoder, on the CPU."""
        prefix = f"{self._checkpoint.family.body}."
        return {name.removeprefix(prefix): read_tensor(self._checkpoint, name).to(self.dtype) for name in names}

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._checkpoint, name).to(self.device, self.dtype)


def _decoder(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = auto_class(checkpoint).from_config(config, dtype=dtype, attn_implementation=attention_of(checkpoint))
        (layer,) = checkpoint.family.layers_of(model)
        add_output_biases(config.get_text_config(), layer)
        factorize(layer, config.get_text_config())
    body: nn.Module = checkpoint.family.body_of(model)
    for module in body.modules():
        _compute_buffers(model, module)
    return body


def _compute_buffers(model: Any, module: nn.Module) -> None:
    """Compute a module's buffers as they are before weights (some of them buffers) are loaded: those of rotary
    embeddings from their configuration, others as transformers does it.
    """
    buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
    if not buffers:
        return
    for name, buffer in buffers.items():
        in_files = name not in module._non_persistent_buffers_set
        empty = torch.empty_like(buffer, device="cpu")
        # NaN, so that a buffer that a class forgets shows.
        module.register_buffer(
            name, empty.fill_(torch.nan) if empty.is_floating_point() else empty, persistent=in_files
        )
    model._init_weights(module)


@torch.no_grad()
def run(layer: nn.Module, hidden_BTC: Tensor) -> Tensor:
    """One layer's output, of the same shape as its input."""
    return run_with_graph(layer, hidden_BTC)


def run_with_graph(layer: nn.Module, hidden_BTC: Tensor) -> Tensor:
    """As ``run``, but autograd follows."""

    def enter(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (hidden_BTC, *inputs[1:])  # replaces what the decoder makes of embeddings before its layers

    handle = layer.get_submodule(LAYER).register_forward_pre_hook(enter)
    try:
        with packed_rows(None):
            output_BTC: Tensor = layer(inputs_embeds=hidden_BTC, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    return output_BTC


class _Reached(Exception):  # noqa: N818  not an error: it ends a computation that has served its purpose
    """Carries the input of a module that is about to run."""

    def __init__(self, input_BTC: Tensor) -> None:
        self.input_BTC = input_BTC


def read_by(inputs: tuple[Tensor, ...], options: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments of a module."""
    hidden: Tensor = inputs[0] if inputs else options["hidden_states"]
    return hidden


@torch.no_grad()
def input_of(module: nn.Module, compute: Callable[[], object]) -> Tensor:
    """The input of a module in a computation, which a hook stops when it reaches the module, by an exception."""

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


def norm_before(layer: nn.Module, units: Units) -> nn.Module:
    """The module that turns the residual stream into the input of the units' block: a norm, or the identity."""
    norm: nn.Module = nn.Identity() if units.block.norm is None else part_of(layer, units.block.norm)
    return norm


def before_block(layer: nn.Module, units: Units, hidden_BTC: Tensor) -> Tensor:
    """The residual stream before the block of some units, given what the layer reads."""
    return input_of(part_of(layer, units.block.reader), partial(run, layer, hidden_BTC))


@torch.no_grad()
def through_mlp(layer: nn.Module, mlp: Units, residual_BTC: Tensor) -> Tensor:
    """The layer's output, given the residual stream before its MLP; the same bits as from ``run``."""
    output_BTC: Tensor = part_of(layer, mlp.block.name)(norm_before(layer, mlp)(residual_BTC))
    return residual_BTC + residual_update(layer, mlp, output_BTC)


@torch.no_grad()
def residual_update(layer: nn.Module, units: Units, output_BTC: Tensor) -> Tensor:
    """What is added to the residual stream for this output of the units' output projection."""
    block = units.block
    if block.norm_after is not None:
        output_BTC = part_of(layer, block.norm_after)(output_BTC)
    return output_BTC if block.multiplier == 1.0 else output_BTC * block.multiplier


def output_for_update(layer: nn.Module, units: Units, update_NC: Tensor, like_NC: Tensor) -> Tensor:
    """The inverse of ``residual_update``: the output of the units' output projection for which this update is added.

    A norm after it divides by each token's size, taken from ``like_NC``, the projection's current output or one close
    to it; channels that it multiplies by 0 need nothing. Both are [tokens, hidden_size], the update in float32.
    """
    if units.block.norm_after is None and units.block.multiplier == 1.0:
        return update_NC
    sizes_NC = like_NC.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12).expand_as(update_NC)
    scale_NC = residual_update(layer, units, sizes_NC.to(like_NC.dtype)).float() / sizes_NC
    return update_NC / scale_NC.where(scale_NC.abs() * sizes_NC.clamp(min=1) > 1e-6, torch.inf)


def before_down(layer: nn.Module, units: Units) -> Biases:
    """What is done before the down projection of the MLP of which ``units`` are the neurons, besides products with
    ``row_matrices``. An MLP whose activation isn't known is refused.
    """
    rows, mlp = _rows(layer, units), part_of(layer, units.block.name)
    acting = [module for module in mlp.children() if not isinstance(module, nn.Linear)]
    if not acting and not units.weights[0].endswith(_GATE_OF_SILU):
        raise UserError(
            f"the activation of {type(mlp).__name__} isn't known, since it is none of its modules; a method whose "
            "refit is dense or none works"
        )
    activation = nn.functional.silu if not acting or isinstance(acting[0], SILU) else acting[0]
    biases = [part for row in rows if row.bias is not None for part in row.bias.data.chunk(units.row_parts[0])]
    return Biases(tuple(biases) or (None,) * len(rows) * units.row_parts[0], activation)


def row_matrices(layer: nn.Module, units: Units) -> tuple[Tensor, ...]:
    """The matrices that compute the neurons of the MLP: gate and up, or only up [neurons, hidden_size]."""
    return tuple(part for row in _rows(layer, units) for part in row.weight.data.chunk(units.row_parts[0]))


def _rows(layer: nn.Module, units: Units) -> list[nn.Linear]:
    return [part_of(layer, name.removesuffix(".weight")) for name in units.weights[:-1]]


def part_of(layer: nn.Module, name: str) -> Any:
    return layer.get_submodule(f"{LAYER}.{name}")


def output_of(layer: nn.Module, units: Units) -> nn.Linear:
    """The output projection, which reads the units' channels."""
    projection: nn.Linear = part_of(layer, units.output)
    return projection


def weights_kept(layer: nn.Module, units: Units, kept: Tensor) -> dict[str, Tensor]:
    """What is left, by name, of parameters that units own parts of, if the units ``kept`` (ascending int64) stay."""
    found = dict(layer.get_submodule(LAYER).named_parameters())
    number, left = output_of(layer, units).in_features // units.channels_per_unit, {}
    kept = send(kept, output_of(layer, units).weight.device)
    for name, place, each in units.owned:
        if name in found:
            entries = entries_of(kept, each.entries, each.stretches, number)
            left[name] = found[name].data.index_select(place, entries)
    return left


def put_weights(layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace parameters, given by their names; sizes may differ."""
    for name, weight in weights.items():
        layer.get_parameter(f"{LAYER}.{name}").data = weight
