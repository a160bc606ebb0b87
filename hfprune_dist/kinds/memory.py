"""The memory that a stage needs of each GPU: weights / ranks + activations + the largest temporary, and a fifth more.

Each kind's module says what these are for its stages, from the model's sizes. They are upper bounds of what the code
keeps; the fifth is for CUDA's context, communication buffers, fragmentation and smaller values. By this need, weights
are placed: whole on each rank wherever they fit, else sharded. Planning and running a stage follow the same rule.
Placements change results by rounding at most.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, NamedTuple

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.token_costs import token_costs
from hfprune_dist.config.parameters import Parameters
from hfprune_dist.config.schema import Sharding
from hfprune_dist.config.section import PositiveOrAuto
from hfprune_dist.core.memory_limits import CHUNK_BYTES
from hfprune_dist.store.stage import Stage
from hfprune_dist.structures import NEURONS

GIB = 2**30
MARGIN = 1.2
# Bytes of a number in each compute dtype, and in the dtypes of sums and of solves.
ITEMSIZE = {"float32": 4, "bfloat16": 2}
FLOAT32, FLOAT64 = 4, 8
# How many parameters DeepSpeed gathers at a time, by default.
LIVE_PARAMETERS = 1_000_000_000
# Tokens at a time that keep a GPU busy: more would only take memory.
BUSY_TOKENS = 2**14
# core.head: of a chunk, logits and another loss's gradient in bfloat16; logits, exponentials and products in float32.
HEAD_BYTES = 8 * CHUNK_BYTES


class Gpus(NamedTuple):
    """The GPUs that a job runs on, one for each rank; ``memory``: bytes of one."""

    ranks: int
    memory: float


@dataclass(frozen=True)
class Need:
    """The memory that a stage needs, in bytes.

    Attributes:
        weights: of the whole model, or of the layers that are there at a time.
        activations: what a micro-batch keeps for backward, or the widest layer of a forward.
        temporary: the largest values that are there only for a while.
        gathered: what ranks gather at a time where they share the weights; None if they never do.
        again: the activations if layers run again in backward; None if that is not for the placement to decide.
        shared: sums, of which each rank has its part.
        unreduced: own terms of such sums, which each of several ranks has until they are reduced.
        host: pinned main memory for hidden states that wait there, of all ranks.
    """

    weights: float
    activations: float
    temporary: float
    gathered: float | None = None
    again: float | None = None
    shared: float = 0.0
    unreduced: float = 0.0
    host: float = 0.0

    def on_each_gpu(self, ranks: int, *, whole: bool, checkpointing: bool = False) -> float:
        """The bytes that each GPU should have, if each rank has all weights (``whole``) or they share them."""
        alone = whole or ranks == 1 or self.gathered is None
        weights = self.weights if alone else self.weights / ranks + (self.gathered or 0.0)
        activations = self.activations if self.again is None or not checkpointing else self.again
        sums = self.shared / ranks + (self.unreduced if ranks > 1 else 0.0)
        return MARGIN * (weights + activations + self.temporary + sums)


@dataclass(frozen=True)
class Placement:
    """How a stage uses memory.

    Attributes:
        whole: whether each rank has all weights; otherwise they are sharded with ZeRO-3.
        checkpointing: whether a training's layers keep only their inputs, and run again in backward.
        fits: whether each GPU has the bytes that are needed.
        needed: these bytes.
    """

    whole: bool
    checkpointing: bool
    fits: bool
    needed: float = 0.0


def place(need: Need, gpus: Gpus, sharding: Sharding) -> Placement:
    """The fastest placement that fits; if none does, the one that takes the least memory.

    Args:
        gpus: of all ranks.
        sharding: ``runtime.sharding``.
    """
    both = [True] if gpus.ranks == 1 else [True, False]
    wholes = {"replicate": [True], "zero3": [False]}.get(sharding, both) if need.gathered is not None else [True]
    ways = []
    for whole, again in product(wholes, [False] if need.again is None else [False, True]):
        needed = need.on_each_gpu(gpus.ranks, whole=whole, checkpointing=again)
        ways.append(Placement(whole, again, needed <= gpus.memory, needed))
    return next((way for way in ways if way.fits), min(ways, key=lambda way: way.needed))


class Passes(NamedTuple):
    """How windows pass a model: so many ``at_once`` on each rank; in passes layer by layer, whether their hidden states
    ``stay`` on the GPU until the next layer.
    """

    at_once: int
    stay: bool = False


def passes(need: Callable[[int], Need], setting: PositiveOrAuto, most: int, gpus: Gpus, sharding: Sharding) -> Passes:
    """Decide by memory: for ``auto``, the largest power of two of windows at once that fits, without sharding weights
    or running layers again where a single window needs neither.

    Args:
        need: windows at once -> what they need.
        setting: windows at once, or ``auto``.
        most: the most that make sense.
    """
    at_once = 1 if setting == "auto" else setting
    placed = place(need(at_once), gpus, sharding)
    while setting == "auto" and 2 * at_once <= most:
        larger = place(need(2 * at_once), gpus, sharding)
        if not larger.fits or (larger.whole, larger.checkpointing) != (placed.whole, placed.checkpointing):
            break
        at_once, placed = 2 * at_once, larger
    return Passes(at_once, placed.needed + need(at_once).host / gpus.ranks <= gpus.memory)


def most_at_once(samples: int, tokens: int, parts: int) -> int:
    """The most windows of so many tokens at once that make sense, if all come to at least so many ``parts``."""
    return max(1, min(BUSY_TOKENS // tokens, samples // parts))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that decide its memory.

    Attributes:
        attention: channels of queries, keys, values and heads' outputs in a layer; ``heads``: of the outputs alone.
        neurons: neurons that a token goes through in the widest layer.
        routed: channels of the outputs of all experts that a token goes through.
        mlp_channels: channels that each output projection of a layer's MLP, or of its experts, reads.
        parameters: of the whole model, and those of its largest layer (``layer``).
    """

    hidden: int
    num_layers: int
    vocabulary: int
    attention: int
    heads: int
    neurons: int
    routed: int
    mlp_channels: tuple[int, ...]
    parameters: int
    layer: int

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Sizes:
        config, experts = checkpoint.config, checkpoint.family.experts
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        size = int(config.get("head_dim") or hidden // heads)
        mlps = checkpoint.pruned_kinds([NEURONS])
        seen = [experts.chosen if experts and units.experts > 1 else 1 for units in mlps]  # experts, by each token
        return cls(
            hidden=hidden,
            num_layers=checkpoint.num_layers,
            vocabulary=int(config["vocab_size"]),
            attention=2 * size * (heads + int(config.get("num_key_value_heads") or heads)),
            heads=size * heads,
            neurons=max(
                sum(units.counts[layer] // units.experts * number for units, number in zip(mlps, seen, strict=True))
                for layer in range(checkpoint.num_layers)
            ),
            routed=experts.chosen * hidden if experts else 0,
            mlp_channels=tuple(units.most // units.experts for units in mlps for _ in range(units.experts)),
            parameters=checkpoint.parameters,
            layer=max(checkpoint.parameter_counts.layers),
        )

    @property
    def gathered(self) -> int:
        """Parameters that ranks gather at a time: those of a layer's experts together, however many they are."""
        return min(self.parameters, max(LIVE_PARAMETERS, self.layer) + self.vocabulary * self.hidden)

    @property
    def forward(self) -> int:
        """Numbers per token that a forward without gradients holds at a time; experts read copies of their tokens."""
        return 4 * max(self.neurons, self.routed) + self.routed + 8 * self.hidden

    def pinned(self, tokens: int) -> float:
        """How many times their size a micro-batch's hidden states take pinned: torch rounds it up to a power of two."""
        numbers = tokens * self.hidden
        return (1 << (numbers - 1).bit_length()) / numbers


def layer_by_layer(
    model: Sizes, rows: int, tokens: int, itemsize: int, *, models: int = 1, temporary: float = 0.0, host: float = 0.0
) -> Need:
    """The need of rows of ``tokens`` tokens in one layer at a time of each model, while the next layer arrives.

    Args:
        host: bytes of hidden states that wait.
    """
    host *= model.pinned(rows * tokens)
    numbers = model.forward + (1 + models) * model.hidden + 2 * model.neurons * (temporary > 0)
    return Need(2 * models * model.layer * itemsize, rows * tokens * numbers * itemsize, temporary, host=host)


def whole_forward(model: Sizes, tokens: int, itemsize: int) -> Need:
    """The need of a forward of the whole model on so many tokens, with all of their logits."""
    return Need(
        model.parameters * itemsize,
        tokens * model.forward * itemsize,
        tokens * model.vocabulary * logits_bytes(itemsize),
        gathered=model.gathered * itemsize,
    )


def generation(checkpoint: Checkpoint, rows: int, tokens: int, itemsize: int) -> Need:
    """The need of rows that grow to so many tokens, with their keys and values, and the logits of the last of each."""
    model = Sizes.from_checkpoint(checkpoint)
    of_a_token = (token_costs(checkpoint).cached_channels + model.forward) * itemsize
    return replace(whole_forward(model, rows, itemsize), activations=rows * tokens * of_a_token)


def logits_bytes(itemsize: int) -> int:
    """Bytes of each logit in an evaluation: as computed, and twice in float32."""
    return itemsize + 2 * FLOAT32


@dataclass(frozen=True)
class Planned:
    """A stage in its plan.

    Attributes:
        stages: all stages, by id.
        dense: the checkpoint that its model is, or was made from.
        checkpointing: ``runtime.activation_checkpointing``.
    """

    stage: Stage
    stages: Mapping[str, Stage]
    dense: Checkpoint
    checkpointing: bool

    def source(self, role: str) -> Any:
        """The settings, of its kind, of the stage that makes an input."""
        return self.stages[self.stage.inputs[role].location].params


class StageParameters(Parameters, ABC):
    """The settings of a kind of stage, and what it needs of a machine.

    Attributes:
        tokenizes: whether it reads text with the tokenizer of its model.
        batch_setting: the setting for how many sequences run at a time.
    """

    tokenizes: ClassVar[bool] = False
    batch_setting: ClassVar[str] = "calibration.micro_batch_size"

    @abstractmethod
    def need(self, planned: Planned) -> Need | None:
        """The memory that the stage needs; None if it runs no model."""


def settings_of(stage: Stage) -> StageParameters:
    """The settings of a stage."""
    assert isinstance(stage.params, StageParameters)
    return stage.params
