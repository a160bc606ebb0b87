"""The memory that a stage needs of each GPU: for each kind, weights on a rank + activations + the largest temporary.

The formulas count what the code keeps, from a model's dimensions; tests compare them with the bytes that small models
take. What they leave out is ``MARGIN``: CUDA's context, communication buffers, fragmentation, smaller values.
Torch-free, so that a login node answers at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.token_costs import TokenCosts
from hfprune_dist.config.parameters import EfficiencyParameters, EvaluateParameters, ImportanceParameters
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.core.criteria import CRITERIA, losses_of
from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES, CHUNK_BYTES, KEPT_BYTES, LOGITS_BYTES
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.structures import KV_GROUPS

GIB = 2**30
MARGIN = 1.2
# Bytes of a number in each compute dtype, and in the dtypes of sums and of solves.
ITEMSIZE = {"float32": 4, "bfloat16": 2}
FLOAT32, FLOAT64 = 4, 8
# How many parameters DeepSpeed gathers at a time, by default.
LIVE_PARAMETERS = 1_000_000_000
# core.head: of a chunk, logits and another loss's gradient in bfloat16; logits, exponentials and products in float32.
HEAD_BYTES = 8 * CHUNK_BYTES
# core.memory_efficient: the portions, in float32, that a gated MLP's backward holds.
GATED_PORTIONS = 7
# Tokens of a request without examples, and of an example: few tasks have longer ones.
REQUEST_TOKENS, EXAMPLE_TOKENS = 1024, 512
# Examples where each task shows its own number.
USUAL_EXAMPLES = 5
# refit.final_norm_refit: about the most tokens that refits of norms see.
NORM_TOKENS = 2**15


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak.

    Attributes:
        weights: a rank's share, with what training keeps for it, and what is gathered for the layers being computed.
        activations: what a micro-batch keeps for backward, or the widest layer of a forward.
        temporary: the largest values that are there only for a while, and sums.
    """

    weights: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.temporary

    @property
    def needed(self) -> float:
        """The bytes that a GPU should have."""
        return MARGIN * self.total


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a job runs on, one for each rank; ``memory``: bytes of one."""

    nodes: int
    per_node: int
    memory: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Job(ABC):
    """What a stage does with a model: ``batch`` sequences of ``tokens`` at a time, in numbers of ``itemsize`` bytes.

    With ``checkpointing``, layers keep only their inputs, and run again in backward.
    """

    batch: int
    tokens: int
    itemsize: int = 2
    checkpointing: bool = False

    @abstractmethod
    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """The memory of one of ``ranks``, over which the model is sharded."""

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank for hidden states that wait there."""
        return 0

    def _weights(self, dims: Dimensions, ranks: int) -> float:
        if ranks == 1:
            return dims.parameters * self.itemsize
        # A layer's experts are two tensors of one module, which are gathered together, however many that makes.
        live = max(LIVE_PARAMETERS, dims.expert_parameters)
        gathered = min(dims.parameters, live + dims.head_parameters)
        return (dims.parameters / ranks + gathered) * self.itemsize


@dataclass(frozen=True)
class Calibration(Job):
    """A pass forward, and backward for each of ``losses`` of the dense model, and of a ``student`` with fewer neurons.

    Attributes:
        samples: all windows.
        kv_groups: whether attention's heads are scored, too.
        curvature: whether g g^T is summed at the outputs of scored modules, and a pass over Gram matrices follows.
        weight_gradients: whether gradients of the weights that units own are summed.
        products: whether weights are multiplied with their gradients, window by window.
    """

    samples: int = 1
    losses: int = 1
    student: bool = False
    kv_groups: bool = False
    curvature: bool = False
    weight_gradients: bool = False
    products: bool = False

    @classmethod
    def of(cls, params: ImportanceParameters, *, checkpointing: bool) -> Calibration:
        """The pass of an importance stage."""
        criteria, calibration = [CRITERIA[name] for name in params.criteria], params.calibration
        losses = [loss.of for loss in losses_of(criteria)]
        return cls(
            batch=min(calibration.micro_batch_size, calibration.samples),
            tokens=calibration.sequence_length,
            itemsize=ITEMSIZE[params.dtype],
            checkpointing=checkpointing,
            samples=calibration.samples,
            losses=losses.count("dense"),
            student="student" in losses,
            kv_groups=KV_GROUPS in params.structures,
            curvature=any(it.needs_moments for it in criteria),
            weight_gradients=any(it.needs_weight_gradients for it in criteria),
            products=any(it.needs_weight_products for it in criteria),
        )

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """See ``Job``; of the pass, or of the one over Gram matrices if that takes more."""
        tokens, hidden = self.batch * self.tokens, dims.hidden_size
        neurons = tokens * dims.intermediate_size
        backward = (dims.mlp_matrices + self.checkpointing) * neurons * self.itemsize
        backward += GATED_PORTIONS * min(ACCELERATOR_BYTES, FLOAT32 * neurons) * (dims.row_projections > 1)
        if self.weight_gradients or self.products:  # what linear layers read, and gradients at their outputs
            backward += FLOAT32 * (neurons + tokens * hidden) + dims.row_projections * neurons * self.itemsize
        ends = tokens * hidden * self.itemsize * (self.losses + 2 + self.student)
        whole = Memory(
            weights=self._weights(dims, ranks),
            activations=tokens * dims.num_layers * self._kept_of_a_token(dims),
            temporary=max(HEAD_BYTES * (1 + self.student), backward) + ends + self._sums(dims, ranks),
        )
        if not self.curvature:
            return whole
        # Of Gram matrices, both sums and their mean; those of the next layer; or in eliminations, three more.
        grams = 4 * FLOAT64 * sum(size**2 for size in _channels(dims, self.kv_groups))
        return max(whole, _one_layer(self, dims, grams), key=lambda it: it.total)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """See ``Job``."""
        return self.curvature * _states(self, dims, self.samples, ranks) * self.itemsize

    def _kept_of_a_token(self, dims: Dimensions) -> int:
        """Bytes for a layer's backward: norms' inputs; q, k, v and attention's output; gate and up, and h where an MLP
        has no gate or it is read again; experts' outputs; in float32, norms' scales and the log-sum-exp of each head.
        """
        reads = self.weight_gradients or self.products
        numbers = 2 * dims.hidden_size + 2 * (dims.num_heads + dims.num_key_value_heads) * dims.head_size
        kept = numbers + dims.routed_channels + reads * (1 + self.kv_groups) * dims.hidden_size
        kept += (dims.row_projections + (self.student or reads or dims.row_projections == 1)) * dims.intermediate_size
        whole = kept * self.itemsize + FLOAT32 * (2 + dims.num_heads)
        if self.checkpointing:
            return dims.hidden_size * self.itemsize + whole // dims.num_layers
        return whole

    def _sums(self, dims: Dimensions, ranks: int) -> int:
        """Bytes of sums for the layers that a rank owns, and of one that is being computed."""
        kinds = 1 + self.kv_groups
        of_layer = [dims.hidden_size**2] * (kinds * self.curvature)
        of_layer += dims.layer_weights(attention=self.kv_groups) if self.weight_gradients else []
        owned = -(-dims.num_layers // ranks)
        return FLOAT64 * owned * sum(of_layer) + 2 * FLOAT64 * max(of_layer, default=0)


Refit = Literal["none", "bias", "dense", "layerwise", "block"]


@dataclass(frozen=True)
class LayerPass(Job):
    """Windows through a model layer by layer, one at a time on each rank: for a reference, for biases, or for a refit.

    Attributes:
        samples: all windows, copies included.
        refit: what is fitted; ``layerwise`` and ``block`` run the pruned model as well as the dense one.
        share_kept: share of the widest layer's neurons that stays.
        kv_groups: whether attention's output projections are fitted, too.
        searches: whether shapes are measured before it, with refits of the dense model's layers.
        norms: whether a refit of norms follows.
        low_rank: whether attention gets matrices of low rank instead.
    """

    samples: int = 1
    refit: Refit = "none"
    share_kept: float = 1.0
    kv_groups: bool = False
    searches: bool = False
    norms: bool = False
    low_rank: bool = False

    @property
    def _pursues(self) -> bool:
        return self.refit in ("layerwise", "block")

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """See ``Job``; of the phase that needs most."""
        phases = [0.0]
        if self.low_rank:
            phases += self._low_rank(dims)
        if self.refit in ("dense", "layerwise", "block"):
            phases += self._least_squares(dims, ranks)
        if self.searches:
            channels = _channels(dims, self.kv_groups)
            grams, widest = sum(it**2 for it in channels), max(channels)
            phases.append(FLOAT64 * (2 * grams + 3 * widest**2 + 7 * dims.hidden_size * widest))
        if self.refit == "block":
            phases.append(self._step(dims, ranks))
        if self.norms:
            phases.append((dims.head_parameters + NORM_TOKENS // 32 * widest_of_a_token(dims)) * self.itemsize)
        return _one_layer(self, dims, max(phases), models=1 + self._pursues)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """See ``Job``; both models' states, those between blocks, and an MLP's inputs with its targets in float32."""
        steps = self.refit == "block"
        number = self.itemsize * (1 + self._pursues * (1 + self.kv_groups) + steps) + FLOAT32 * steps
        waiting = _states(self, dims, self.samples, ranks) * number
        if dims.experts is not None and ranks > 1 and self.refit == "dense":  # matrices until each rank has a layer
            channels = _channels(dims, self.kv_groups)
            waiting += sum(2 * FLOAT64 * it**2 + self.itemsize * dims.hidden_size * it for it in channels)
        if self.norms:  # before all layers, of both models
            seen = min(self.samples, max(1, NORM_TOKENS // self.tokens))
            waiting = max(waiting, (dims.num_layers + 4) * _states(self, dims, seen, ranks) * self.itemsize)
        return waiting

    def _least_squares(self, dims: Dimensions, ranks: int) -> list[float]:
        """Gram matrices of windows that are fitted and of those that are held out, with those of a layer that waits;
        and a solve of the widest block, in float64.
        """
        channels, hidden = _channels(dims, self.kv_groups), dims.hidden_size
        kept = self.share_kept * max(channels)
        if self._pursues:  # what the block reads, with the dense model's hidden states
            size, squares, products = kept + hidden, (kept + hidden) ** 2, 1 + (ranks > 1)
        else:
            size, squares, products = max(channels), sum(it**2 for it in channels), 1
        waits = ranks > 1 and not self._pursues and dims.experts is None
        solve = 2 * squares + 4 * kept**2 + hidden * (products * size + 6 * kept)
        return [2 * FLOAT64 * squares * (1 + waits), FLOAT64 * solve]

    def _step(self, dims: Dimensions, ranks: int) -> float:
        """A Gauss-Newton step: two Gram matrices of what stays, their inversion or the iterations, and what a rank
        keeps of its micro-batches.
        """
        kept = self.share_kept * dims.intermediate_size
        weights, tokens = dims.mlp_matrices * kept * dims.hidden_size, _tokens_of_a_rank(self, self.samples, ranks)
        linearized = min(KEPT_BYTES, tokens * (dims.mlp_matrices * kept + dims.hidden_size) * self.itemsize)
        return 16 * kept**2 + max(36 * kept**2, 12 * kept**2 + 60 * weights) + linearized

    def _low_rank(self, dims: Dimensions) -> list[float]:
        """Layers' inputs in float64; the eigenvectors of the largest matrix, with the factors."""
        inputs = 2 * FLOAT64 * self.batch * self.tokens * max(dims.intermediate_size, dims.attention_size)
        rows = max(dims.hidden_size, dims.attention_size)
        return [inputs, FLOAT64 * (7 * rows**2 + 2 * dims.attention_parameters)]


@dataclass(frozen=True)
class Train(Job):
    """LoRA training, ``rank`` on all linear layers of attention and MLP; in a mixture of experts, on attention's.

    Attributes:
        distills: whether the loss is the divergence from a dense model, whose head is there as well.
        masks: whether the inputs of output projections are multiplied by masks (LoRAPrune).
    """

    rank: int = 8
    dropout: bool = False
    distills: bool = False
    masks: bool = False

    @classmethod
    def of(cls, settings: LoraTraining, tokens: int, *, distills: bool, masks: bool = False) -> Train:
        """The job of a stage with these settings on rows of ``tokens`` tokens."""
        how = {"rank": settings.rank, "dropout": settings.dropout > 0, "distills": distills, "masks": masks}
        return cls(settings.rows_at_once, tokens, ITEMSIZE[settings.dtype], **how)  # type: ignore[arg-type]

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """See ``Job``."""
        tokens, layer = self.batch * self.tokens, self.layer_bytes(dims, sharded=ranks > 1)
        # In float32: the weight, its gradient and two moments; in the compute dtype: the weight.
        lora = self.lora_parameters(dims) * (4 * FLOAT32 + self.itemsize)
        inputs = dims.num_layers * dims.hidden_size * self.itemsize + layer
        # The logits; in float32: the logits again, their log-softmax and its gradient.
        head = tokens * dims.vocabulary * (self.itemsize + 3 * FLOAT32)
        if self.distills:  # in chunks, for both models; final hidden states and the gradient there
            head = 2 * HEAD_BYTES + 3 * tokens * dims.hidden_size * self.itemsize
        return Memory(
            weights=self._weights(dims, ranks) + lora / ranks,
            activations=tokens * (inputs if self.checkpointing else dims.num_layers * layer),
            temporary=head,
        )

    def lora_parameters(self, dims: Dimensions) -> int:
        """Parameters of A and B of every projection that is trained (see ``checkpoints.lora_adapter``)."""
        sides = dims.adapted_inputs + dims.adapted_outputs
        sides += 0 if dims.is_mixture else dims.mlp_matrices * (dims.hidden_size + dims.intermediate_size)
        return round(dims.num_layers * self.rank * sides)

    def layer_bytes(self, dims: Dimensions, *, sharded: bool) -> int:
        """Bytes per token that one of Hugging Face's layers keeps for backward: norms in float32, attention, what the
        MLP multiplies, experts' outputs; what linear layers read, with dropout a copy and a mask for each.
        """
        hidden, read_by_mlp = dims.hidden_size, dims.hidden_size + dims.beside_experts
        attention = 2 * (dims.num_heads + dims.num_key_value_heads) * dims.head_size
        kept = attention + (2 * dims.row_projections - 1) * dims.intermediate_size + dims.routed_channels
        kept += dims.attention_size * (self.masks and (sharded or not self.dropout))  # masked, beside what it was
        dropped = 0.0
        if self.dropout:
            of_mlp = 0 if dims.is_mixture else dims.row_projections * hidden + dims.intermediate_size
            dropped = (dims.adapted_inputs + of_mlp) * (self.itemsize + 1)
            kept += (hidden + read_by_mlp) * sharded  # DeepSpeed's frozen linear layers keep what they read
        else:
            kept += hidden + read_by_mlp * (sharded or not dims.is_mixture)
        return round(2 * FLOAT32 * hidden + kept * self.itemsize + dropped)


@dataclass(frozen=True)
class Evaluate(Job):
    """Forwards of ``batch`` requests of tasks, and of text in windows of ``window`` tokens, one by one.

    Requests may have all ``positions`` of the model, examples included; then fewer run at a time (``LOGITS_BYTES``).
    A single one has no more than ``tokens``.
    """

    positions: int = 0
    window: int = 0

    @classmethod
    def of(cls, params: EvaluateParameters, window: int, positions: int | None) -> Evaluate:
        """The job of an evaluation.

        Args:
            positions: the most tokens that the model reads; None if it doesn't say.
        """
        shots = USUAL_EXAMPLES if params.num_fewshot is None else params.num_fewshot
        longest = REQUEST_TOKENS + shots * EXAMPLE_TOKENS
        batch = params.batch_size if params.tasks else 0
        tokens, itemsize = min(longest, positions or longest), ITEMSIZE[params.dtype]
        return cls(batch, tokens, itemsize, positions=positions or longest, window=window)

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """See ``Job``."""
        of_a_token = dims.vocabulary * logits_bytes(self.itemsize)
        requests = min(self.batch * self.positions, max(LOGITS_BYTES // of_a_token, self.tokens))
        tokens = max(requests, self.window)
        return Memory(
            weights=self._weights(dims, ranks),
            activations=tokens * widest_of_a_token(dims) * self.itemsize,
            temporary=tokens * of_a_token,
        )


def logits_bytes(itemsize: int) -> int:
    """Bytes of each logit in an evaluation: as computed, and twice in float32."""
    return itemsize + 2 * FLOAT32


@dataclass(frozen=True)
class Generate(Job):
    """Two models in turn generate ``batch`` sequences, each ``tokens`` long in the end, all on rank 0.

    ``cached_channels``: what the dense model caches of a token (see ``TokenCosts``); a pruned one caches no more.
    """

    cached_channels: int = 0

    @classmethod
    def of(cls, params: EfficiencyParameters, dense: Checkpoint) -> Generate:
        """The job of a stage that measures the efficiency of this dense model, or of one pruned from it."""
        cached = TokenCosts.of(dense).cached_channels
        return cls(max(params.batch_sizes), params.most_tokens, ITEMSIZE[params.dtype], cached_channels=cached)

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """Memory on rank 0, however many others wait."""
        tokens = self.batch * self.tokens
        return Memory(
            weights=2 * dims.parameters * self.itemsize,
            activations=tokens * (self.cached_channels + widest_of_a_token(dims)) * self.itemsize,
            temporary=self.batch * dims.vocabulary * self.itemsize,
        )


def fits(job: Job, dims: Dimensions, gpus: Gpus) -> bool:
    """Whether the GPUs have what a job needs if its model is sharded over all of them."""
    return job.memory(dims, gpus.ranks).needed <= gpus.memory


def widest_of_a_token(dims: Dimensions) -> int:
    """Numbers per token that a forward without gradients holds at a time."""
    of_mlp = 2 * dims.row_projections * dims.intermediate_size
    copy = dims.routed_channels  # each expert reads copies of its tokens; its outputs are weighted and reordered
    return max(of_mlp + copy, 4 * copy) + 8 * dims.hidden_size


def _one_layer(job: Job, dims: Dimensions, temporary: float, models: int = 1) -> Memory:
    """Memory of one layer at a time of each model, while the next one and the next micro-batch arrive."""
    tokens, read = job.batch * job.tokens, max(_channels(dims, attention=True))
    if dims.experts is not None:
        read = max(read, dims.experts.chosen * dims.experts.width)
    numbers = (widest_of_a_token(dims) + (1 + models) * dims.hidden_size) * job.itemsize
    return Memory(
        weights=2 * models * dims.layer_parameters * job.itemsize,
        activations=tokens * (numbers + FLOAT32 * read * (temporary > 0)),
        temporary=temporary,
    )


def _channels(dims: Dimensions, attention: bool) -> list[int]:
    """Channels that output projections read: of MLPs or experts, and of attention."""
    return [*dims.mlp_channels, *([dims.attention_size] if attention else [])]


def _tokens_of_a_rank(job: Job, samples: int, ranks: int) -> int:
    """The most tokens that any rank gets when whole micro-batches are distributed."""
    return min(samples, -(-samples // (job.batch * ranks)) * job.batch) * job.tokens


def _states(job: Job, dims: Dimensions, samples: int, ranks: int) -> int:
    """Numbers of the hidden states of a rank's windows."""
    return _tokens_of_a_rank(job, samples, ranks) * dims.hidden_size
