"""What a stage needs of a cluster, from a model's dimensions: gathered bytes, floating-point work, memory per GPU.

Estimates, not measurements: products of matrices and gathered bytes are counted as the code makes them, other work is
not; memory leaves out fragmentation and the runtime's own buffers, for which ``RESERVE`` is kept free; times assume
``EFFICIENCY``.
Torch-free, so that a login node answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

# Of a GPU's memory: the runtime's context, communication buffers, fragmentation.
RESERVE = 0.1
# Of a GPU's nominal floating-point rate, what dense transformers reach in practice; and of a network's nominal rate.
EFFICIENCY = 0.4
NETWORK_EFFICIENCY = 0.8
# DeepSpeed's defaults: parameters that may be gathered at a time, and those too small to be sharded, in elements.
LIVE_PARAMETERS = 1_000_000_000
SMALL_PARAMETER = 100_000
# core.head: of a chunk its logits and another loss's gradient in the model's dtype; in float32 the logits, exponentials
# and their products.
HEAD_CHUNK_BYTES = 2 * 32 * 2**20 + 3 * 64 * 2**20
# core.blocks: of a portion on an accelerator, in float32; core.fused: as many of them in a gated MLP's backward.
PORTION_BYTES, GATED_PORTIONS = 64 * 2**20, 7
# scoring.shard_sums: of each number of the curvature, with a shard's in float32; and without it, after the pass: an
# exact sum over shards, of this rank and of all, 8 bytes each.
CURVATURE_BYTES, CURVATURE_SUMS_BYTES = 20, 16
# distributed.layer_stream: for each number of a Gram matrix two exact sums, in 8 bytes each, with what is added to
# them; and the two matrices that are made of them.
GRAM_BYTES, GRAMS_BYTES = 36, 16
# core.elimination: for each number of a layer's Gram matrix, with what is made of it, but for products that wait (384
# numbers a neuron); of a matrix that waits for its turn.
ELIMINATION_BYTES, MOMENTS_BYTES = 32, 8
# core.gauss_newton: for each number of activations' Gram matrix, while it is inverted, and afterwards; for each
# weight of an MLP the vectors of conjugate gradients and where steps begin.
INVERSE_BYTES, INVERTED_BYTES, STEP_BYTES = 36, 12, 60
# refit.gauss_newton_ranks: what is kept of micro-batches between iterations.
KEPT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Dimensions:
    """A decoder's dimensions, as they decide memory and work."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def attention_parameters(self) -> int:
        return self.hidden_size * self.head_size * (2 * self.num_heads + 2 * self.num_key_value_heads)

    @property
    def layer_parameters(self) -> int:
        """The matrices of one layer; norms and biases are too few to matter."""
        return self.attention_parameters + 3 * self.hidden_size * self.intermediate_size

    @property
    def body_parameters(self) -> int:
        return self.num_layers * self.layer_parameters

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.head_parameters * (1 if self.tied else 2)


def dimensions_of(config: Mapping[str, Any]) -> Dimensions:
    """The dimensions that a ``config.json`` describes."""
    heads = int(config["num_attention_heads"])
    return Dimensions(
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak.

    Attributes:
        weights: this rank's shards, and what training keeps for each of them.
        gathered: whole parameters of the layers at work.
        activations: kept for backward, for all tokens of a micro-batch.
        scratch: of the head, with what the loss makes of its logits; or of a layer's backward, where that is more.
        sums: over tokens, such as Gram matrices, with what is made of them.
    """

    weights: float
    gathered: float
    activations: float
    scratch: float
    sums: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gathered + self.activations + self.scratch + self.sums


@dataclass(frozen=True)
class Work:
    """What one micro-batch costs one rank.

    Attributes:
        flops: floating-point operations.
        gathered_bytes: bytes of whole parameters that ZeRO-3 gathers; of them, a rank receives (ranks - 1) / ranks.
    """

    flops: float
    gathered_bytes: float


@dataclass(frozen=True)
class Importance:
    """A calibration pass: ``windows`` of ``tokens`` at a time, a backward for each of ``losses``.

    With ``curvature``, it also adds up g g^T at the output of every MLP; a pass layer by layer follows for their Gram
    matrices, on all of ``samples`` windows, without the model.
    With a ``student`` the model runs again without some neurons, forward and backward, with the dense model as teacher.
    """

    windows: int
    tokens: int
    losses: int = 1
    itemsize: int = 2
    checkpointing: bool = False
    curvature: bool = False
    student: bool = False
    samples: int | None = None

    def resized(self, windows: int) -> Importance:
        """The same with so many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dimensions: Dimensions, ranks: int) -> int:
        """Main memory that one rank's curvature takes, and, when the model is gone, hidden states of its windows."""
        if not self.curvature:
            return 0
        assert self.samples is not None, "the pass layer by layer goes over all windows"
        numbers = dimensions.num_layers * dimensions.hidden_size**2
        hidden = (
            _tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks) * dimensions.hidden_size * self.itemsize
        )
        return max(CURVATURE_BYTES * numbers, CURVATURE_SUMS_BYTES * numbers + hidden)

    def memory(self, dimensions: Dimensions, ranks: int) -> Memory:
        """On one of the ranks that the model is sharded over: the larger of both passes."""
        moments = _memory_of_layer_pass(
            dimensions, self.windows * self.tokens, self.itemsize, dimensions.intermediate_size
        )
        numbers = dimensions.intermediate_size**2
        waiting = MOMENTS_BYTES * numbers if ranks > 1 else 0
        moments = replace(moments, sums=max(moments.sums + waiting, ELIMINATION_BYTES * numbers))
        pass_through = self._memory_of_pass(dimensions, ranks)
        return max(pass_through, moments, key=lambda it: it.total) if self.curvature else pass_through

    def _memory_of_pass(self, dimensions: Dimensions, ranks: int) -> Memory:
        tokens = self.windows * self.tokens
        head = HEAD_CHUNK_BYTES * (2 if self.student else 1)
        numbers = tokens * dimensions.intermediate_size
        # Gradients at h, gate and up; and h itself in a layer that runs again.
        backward = (3 + self.checkpointing) * numbers * self.itemsize + GATED_PORTIONS * min(PORTION_BYTES, 4 * numbers)
        return Memory(
            weights=dimensions.parameters * self.itemsize / ranks,
            gathered=_gathered_at_a_time(dimensions, self.itemsize, ranks),
            activations=tokens * self.activation_bytes(dimensions),
            scratch=max(head, backward)
            + tokens * dimensions.hidden_size * self.itemsize * (self.losses + 2 + self.student),
        )

    def activation_bytes(self, dimensions: Dimensions) -> int:
        """Bytes a token that stay until backward. The graph begins at the first layer's neurons."""
        first, kept = dimensions.intermediate_size * self.itemsize, self.layer_bytes(dimensions)
        later = dimensions.num_layers - 1
        return first + (later * dimensions.hidden_size * self.itemsize + kept if self.checkpointing else later * kept)

    def layer_bytes(self, dimensions: Dimensions) -> int:
        """Bytes a token of one layer: norms' inputs, q, k, v and attention's output, gate and up; a student's h."""
        attention = 2 * (dimensions.num_heads + dimensions.num_key_value_heads) * dimensions.head_size
        values = 2 * dimensions.hidden_size + attention + (3 if self.student else 2) * dimensions.intermediate_size
        return values * self.itemsize + 4 * (
            2 + dimensions.num_heads
        )  # float32: norms' scales, log-sum-exp of each head

    def work(self, dimensions: Dimensions) -> Work:
        """Of one micro-batch: a forward, the head forward once and backward for each loss, the body's backwards.

        Gathered bytes are the most there can be where activations are checkpointed or a model does not stay gathered.
        """
        tokens, later_share = self.windows * self.tokens, (dimensions.num_layers - 1) / dimensions.num_layers
        down_projection = dimensions.hidden_size * dimensions.intermediate_size
        later_layers = dimensions.body_parameters - dimensions.layer_parameters
        attention = _attention_flops(dimensions, self.tokens)
        forward = 2 * dimensions.body_parameters + attention
        # The head's forwards: once for all losses of the dense model; for a student its own and its teacher's.
        heads = 2 * dimensions.head_parameters * (bool(self.losses) + 2 * self.student)
        # The graph begins at the first layer's neurons. Backward of flash attention: five products for forward's two.
        backward_parameters = later_layers + down_projection
        backward = 2 * (backward_parameters + dimensions.head_parameters) + 2.5 * later_share * attention
        # Of a layer that runs again, nothing that backward needs comes after its neurons.
        rerun = 2 * (later_layers - (dimensions.num_layers - 1) * down_projection) + later_share * attention
        passes, backwards = 1 + self.student, self.losses + self.student
        reruns = backwards if self.checkpointing else 0
        gathered = passes * (2 * dimensions.head_parameters + dimensions.body_parameters)
        if self.checkpointing or not _stays_gathered(dimensions):
            gathered += backwards * backward_parameters + reruns * later_layers
        return Work(
            tokens * (passes * forward + heads + backwards * backward + reruns * rerun), gathered * self.itemsize
        )


@dataclass(frozen=True)
class Train:
    """LoRA training: ``rows`` of ``tokens`` at a time, rank ``rank`` on all projections of a layer.

    Where it ``distills``, its head never has the logits of all tokens, but a dense model's beside its own.
    """

    rows: int
    tokens: int
    rank: int
    dropout: bool
    itemsize: int = 2
    distills: bool = False

    def resized(self, rows: int) -> Train:
        """The same with so many rows in a micro-batch."""
        return replace(self, rows=rows)

    def memory(self, dimensions: Dimensions, ranks: int) -> Memory:
        """On one of the ranks that model, LoRA weights and optimizer are sharded over."""
        tokens = self.rows * self.tokens
        # In float32: the weight, its gradient and two moments; and the weight that computes.
        lora = self.lora_parameters(dimensions) * (4 * 4 + self.itemsize)
        return Memory(
            weights=(dimensions.parameters * self.itemsize + lora) / ranks,
            gathered=_gathered_at_a_time(dimensions, self.itemsize, ranks),
            activations=tokens * dimensions.num_layers * self.layer_bytes(dimensions),
            scratch=self.logits_bytes(dimensions),
        )

    def logits_bytes(self, dimensions: Dimensions) -> int:
        """Of a micro-batch's head."""
        tokens = self.rows * self.tokens
        if self.distills:  # final hidden states of both models, and the gradient there
            return 2 * HEAD_CHUNK_BYTES + 3 * tokens * dimensions.hidden_size * self.itemsize
        # The logits, and in float32: themselves, their log-softmax and its gradient.
        return tokens * dimensions.vocabulary * (self.itemsize + 3 * 4)

    def lora_parameters(self, dimensions: Dimensions) -> int:
        """Of A and B of every projection."""
        hidden, inner = dimensions.hidden_size, dimensions.intermediate_size
        heads, groups = (
            dimensions.num_heads * dimensions.head_size,
            dimensions.num_key_value_heads * dimensions.head_size,
        )
        sides = 2 * (hidden + heads) + 2 * (hidden + groups) + 3 * (hidden + inner)
        return dimensions.num_layers * self.rank * sides

    def layer_bytes(self, dimensions: Dimensions) -> int:
        """Bytes a token of one layer, as Hugging Face's layers keep them for backward."""
        heads = dimensions.num_heads * dimensions.head_size
        norms = 2 * 4 * dimensions.hidden_size
        attention = 2 * (dimensions.num_heads + dimensions.num_key_value_heads) * dimensions.head_size * self.itemsize
        gated = 3 * dimensions.intermediate_size * self.itemsize
        if self.dropout:  # a dropped copy and a mask for each projection
            inputs = (5 * dimensions.hidden_size + heads + dimensions.intermediate_size) * (self.itemsize + 1)
        else:
            inputs = (2 * dimensions.hidden_size + dimensions.intermediate_size) * self.itemsize
        return norms + attention + gated + inputs

    def work(self, dimensions: Dimensions) -> Work:
        """Of one micro-batch: a forward, and a backward without gradients of frozen weights; a teacher's head."""
        matrices = dimensions.body_parameters + dimensions.head_parameters
        teacher = 2 * dimensions.head_parameters if self.distills else 0
        flops = (
            4 * matrices
            + teacher
            + 6 * self.lora_parameters(dimensions)
            + 3.5 * _attention_flops(dimensions, self.tokens)
        )
        gathered = 2 * matrices + dimensions.head_parameters
        return Work(self.rows * self.tokens * flops, gathered * self.itemsize)


@dataclass(frozen=True)
class Evaluate:
    """Forward passes of ``sequences`` of at most ``tokens`` at a time; whole weights on each rank where they fit."""

    sequences: int
    tokens: int
    itemsize: int = 2

    def resized(self, sequences: int) -> Evaluate:
        """The same with so many sequences in a batch."""
        return replace(self, sequences=sequences)

    def memory(self, dimensions: Dimensions, ranks: int) -> Memory:
        """On one of the ranks that the model is sharded over."""
        tokens = self.sequences * self.tokens
        return Memory(
            weights=dimensions.parameters * self.itemsize / ranks,
            gathered=_gathered_at_a_time(dimensions, self.itemsize, ranks),
            activations=tokens * _widest(dimensions) * self.itemsize,
            scratch=tokens * dimensions.vocabulary * (self.itemsize + 2 * 4),
        )

    def work(self, dimensions: Dimensions) -> Work:
        """Of one batch."""
        matrices = dimensions.body_parameters + dimensions.head_parameters
        flops = 2 * matrices + _attention_flops(dimensions, self.tokens)
        return Work(self.sequences * self.tokens * flops, (matrices + dimensions.head_parameters) * self.itemsize)


@dataclass(frozen=True)
class Refit:
    """Least squares on every MLP, layer by layer, a micro-batch being ``windows`` of ``tokens``.

    Attributes:
        samples: all calibration windows.
        pursues: whether it goes through the pruned model as well as the dense one, towards the dense hidden states.
        steps: whether steps of Gauss-Newton on whole MLPs follow.
        searches: whether widths are searched with refits of the dense model's layers before it.
        share_kept: of the widest layer's neurons.
    """

    windows: int
    tokens: int
    samples: int
    pursues: bool
    steps: bool
    searches: bool
    share_kept: float
    itemsize: int = 2

    def resized(self, windows: int) -> Refit:
        """The same with so many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dimensions: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states, of one model or both; for a step, what an MLP reads
        and, in float32, its target.
        """
        mine = _tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        number_bytes = self.itemsize * (1 + self.pursues + self.steps) + 4 * self.steps
        return mine * dimensions.hidden_size * number_bytes

    def memory(self, dimensions: Dimensions, ranks: int) -> Memory:
        """On one rank: of the sums, of least squares, or of a step, whichever needs most."""
        tokens, kept = self.windows * self.tokens, self.share_kept * dimensions.intermediate_size
        size = kept + dimensions.hidden_size if self.pursues else dimensions.intermediate_size
        widest = max(size, dimensions.intermediate_size) if self.searches else size
        layer_pass = _memory_of_layer_pass(dimensions, tokens, self.itemsize, widest)
        if self.pursues:
            layer_pass = replace(layer_pass, weights=2 * layer_pass.weights)
        elif ranks > 1:  # a layer's matrices wait until every rank has a layer to solve
            layer_pass = replace(layer_pass, sums=layer_pass.sums + GRAMS_BYTES * size**2)
        phases = [layer_pass.sums, self._solving(dimensions, kept, size)]
        if self.steps:
            phases.append(self._stepping(dimensions, kept, ranks))
        return replace(layer_pass, sums=max(phases))

    def _solving(self, dimensions: Dimensions, kept: float, size: float) -> float:
        """Bytes of least squares: two Gram matrices of all neurons, four of those that stay, and weights; float64."""
        return 8 * (2 * size**2 + 4 * kept**2 + dimensions.hidden_size * (size + 6 * kept))

    def _stepping(self, dimensions: Dimensions, kept: float, ranks: int) -> float:
        """Bytes of a step: two Gram matrices of the kept neurons in float64, what inverts them, what iterates."""
        mine = _tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        linearized = min(KEPT_BYTES, mine * (3 * kept + dimensions.hidden_size) * self.itemsize)
        weights = 3 * kept * dimensions.hidden_size
        inverting, iterating = INVERSE_BYTES * kept**2, INVERTED_BYTES * kept**2 + STEP_BYTES * weights
        return 16 * kept**2 + max(inverting, iterating) + linearized


@dataclass(frozen=True)
class Reference:
    """All of ``samples`` windows through the dense model, layer by layer, ``windows`` of ``tokens`` at a time."""

    windows: int
    tokens: int
    samples: int
    itemsize: int = 2

    def resized(self, windows: int) -> Reference:
        """The same with so many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dimensions: Dimensions, ranks: int) -> int:
        """Main memory of one rank: its windows' hidden states."""
        mine = _tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks)
        return mine * dimensions.hidden_size * self.itemsize

    def memory(self, dimensions: Dimensions, ranks: int) -> Memory:
        """On one rank, whatever their number."""
        return _memory_of_layer_pass(dimensions, self.windows * self.tokens, self.itemsize, 0)


# What is known to be bound by products in the compute dtype, or by gathers.
TimedJob = Importance | Train | Evaluate
# What has a layer at a time on each rank.
LayerPass = Refit | Reference
Job = TimedJob | LayerPass


@dataclass(frozen=True)
class Gpus:
    """What a job runs on.

    Attributes:
        memory: bytes of one GPU.
        flops: nominal floating-point operations per second of one GPU in the compute dtype.
        network: nominal bytes per second between two nodes.
    """

    nodes: int
    per_node: int
    memory: float
    flops: float | None = None
    network: float | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


def fits(job: Job, dimensions: Dimensions, gpus: Gpus) -> bool:
    """Whether the job's peak leaves ``RESERVE`` of a GPU's memory free."""
    return job.memory(dimensions, gpus.ranks).total <= (1 - RESERVE) * gpus.memory


def seconds(job: TimedJob, dimensions: Dimensions, gpus: Gpus) -> tuple[float, float]:
    """Of one micro-batch on each rank: at work, and on the network; the larger one counts where they overlap.

    A ring over all ranks carries every gathered byte once through each node's link; inside a node there is none.
    """
    assert gpus.flops is not None, "the rate of a GPU is not known"
    work = job.work(dimensions)
    at_work = work.flops / (EFFICIENCY * gpus.flops)
    if gpus.nodes == 1 or gpus.network is None:
        return at_work, 0.0
    return at_work, work.gathered_bytes * (gpus.ranks - 1) / gpus.ranks / (NETWORK_EFFICIENCY * gpus.network)


def _gathered_at_a_time(dimensions: Dimensions, itemsize: int, ranks: int) -> float:
    """Bytes of gathered parameters that DeepSpeed holds; one rank alone holds all as its own."""
    return 0.0 if ranks == 1 else min(dimensions.parameters, LIVE_PARAMETERS + dimensions.head_parameters) * itemsize


def _tokens_of_a_rank(samples: int, windows: int, tokens: int, ranks: int) -> int:
    """The most that any rank gets, of micro-batches that are dealt out whole."""
    return min(samples, -(-samples // (windows * ranks)) * windows) * tokens


def _widest(dimensions: Dimensions) -> int:
    """Numbers a token that a forward without gradients has at a time."""
    return 4 * dimensions.intermediate_size + 8 * dimensions.hidden_size


def _memory_of_layer_pass(dimensions: Dimensions, tokens: int, itemsize: int, size: float) -> Memory:
    """Of one layer at a time, where Gram matrices of vectors of ``size`` are added up."""
    return Memory(
        weights=dimensions.layer_parameters * itemsize,
        gathered=0.0,
        activations=tokens * (_widest(dimensions) * itemsize + 4 * size),
        scratch=0.0,
        sums=GRAM_BYTES * size**2,
    )


def _stays_gathered(dimensions: Dimensions) -> bool:
    """Whether DeepSpeed keeps what it has gathered in forward until backward is over."""
    return dimensions.parameters <= LIVE_PARAMETERS


def _attention_flops(dimensions: Dimensions, tokens: int) -> float:
    """A token's share of both products of causal attention in all layers, forward."""
    return dimensions.num_layers * 2 * tokens * dimensions.num_heads * dimensions.head_size
