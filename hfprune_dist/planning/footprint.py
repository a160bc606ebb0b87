"""What a stage needs of a cluster, from a model's dimensions: gathered bytes, floating-point work, memory per GPU.

Estimates, not measurements: products of matrices and gathered bytes are counted as the code makes them, other work is
not; memory leaves out fragmentation and the runtime's own buffers, for which ``RESERVE`` is kept free. Times are in
``timing``.
Torch-free, so that a login node answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hfprune_dist.config.training import LoraTraining
from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES, CHUNK_BYTES
from hfprune_dist.core.triangle import BLOCK, packed_size
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.evaluation_footprint import Evaluate
from hfprune_dist.planning.gathering import attention_flops, gathered_at_a_time, stays_gathered
from hfprune_dist.planning.generation_footprint import Generate
from hfprune_dist.planning.gpu_needs import ITEMSIZE, Gpus, Memory, Work
from hfprune_dist.planning.layer_pass_footprint import (
    LowRank,
    Reference,
    Refit,
    memory_of_layer_pass,
    pinned_bytes,
    tokens_of_a_rank,
)
from hfprune_dist.planning.product_footprint import coupled_bytes, squared_bytes

# Of a GPU's memory: the runtime's context, communication buffers, fragmentation.
RESERVE = 0.1
# core.head: of a chunk its logits and another loss's gradient in bfloat16; in float32, twice as wide, the logits,
# exponentials and their products.
HEAD_CHUNK_BYTES = 2 * CHUNK_BYTES + 3 * 2 * CHUNK_BYTES
# core.memory_efficient: portions, in float32, of a gated MLP's backward.
GATED_PORTIONS = 7
# scoring.layer_sums: of each number of a layer's matrix, while it is made, in float32; of each that is rounded at a
# time, of curvature a block of rows; of each that a rank owns, and of one on its way, of curvature packed; in main
# memory while it is saved.
TERM_BYTES, ROUNDED_BYTES, OWNED_BYTES, SAVED_BYTES = 4, 16, 8, 16
# core.elimination: for each number of a layer's Gram matrix, with what is made of it, but for products that wait (384
# numbers a neuron); of a matrix that waits for its turn.
ELIMINATION_BYTES, MOMENTS_BYTES = 32, 8


@dataclass(frozen=True)
class Importance:
    """A calibration pass: ``windows`` of ``tokens`` at a time, a backward for each of ``losses``.

    With ``curvature``, it also adds up g g^T at the output of every MLP, each rank for its share of the layers; a pass
    layer by layer follows for their Gram matrices, on all of ``samples`` windows, without the model. With ``kv_groups``
    it does at attention's outputs what it does at those of MLPs.
    With ``weight_gradients`` it adds up the gradients of the weights that units own, shared out in the same way. With
    ``squared_products`` it makes them window by window, and with ``coupled_products`` those of neurons' weights: of the
    dense model's losses, if there are any, else of the student's.
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
    kv_groups: bool = False
    weight_gradients: bool = False
    squared_products: bool = False
    coupled_products: bool = False

    def resized(self, windows: int) -> Importance:
        """The same with so many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank for a layer's matrix that is saved, or later for hidden states of its windows."""
        saved = SAVED_BYTES * max([*self._weights(dims), self.curvature * packed_size(dims.hidden_size)])
        if not self.curvature:
            return saved
        assert self.samples is not None, "the pass layer by layer goes over all windows"
        hidden = tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks) * dims.hidden_size * self.itemsize
        hidden += pinned_bytes(dims, self.windows * self.tokens, self.itemsize)
        return max(saved, hidden)

    def curvature_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Of the layers that a rank owns, of each kind of units, and of the one whose matrix is made."""
        if not self.curvature:
            return 0
        size = dims.hidden_size
        packed = len(self._sizes(dims)) * -(-dims.num_layers // ranks) + (ranks > 1)
        made = TERM_BYTES * size**2 + ROUNDED_BYTES * min(BLOCK, size) * size
        return OWNED_BYTES * packed * packed_size(size) + made

    def gradient_bytes(self, dims: Dimensions, ranks: int) -> int:
        """The same of gradients: of the layers that a rank owns, and of the one weight whose turn it is."""
        weights = self._weights(dims)
        owned = OWNED_BYTES * -(-dims.num_layers // ranks) * sum(weights)
        made = TERM_BYTES + ROUNDED_BYTES + (OWNED_BYTES if ranks > 1 else 0)
        return owned + made * max(weights, default=0)

    @property
    def _sees_mlps(self) -> bool:
        """Whether inputs and output gradients of MLPs' linear layers are seen."""
        return self.weight_gradients or self.squared_products or self.coupled_products

    @property
    def _sees_attention(self) -> bool:
        """Whether those of attention's linear layers are."""
        return self.kv_groups and (self.weight_gradients or self.squared_products)

    @property
    def _sees_student(self) -> bool:
        """Whether what MLPs' show is a student's, of which h is kept with and without its mask."""
        return self.coupled_products and not self.losses

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """On one of the ranks that the model is sharded over: the larger of both passes."""
        sizes = self._sizes(dims)
        moments = memory_of_layer_pass(dims, self.windows * self.tokens, self.itemsize, sizes)
        # Of other kinds than the one whose turn it is, matrices wait; on several ranks, those of another layer too.
        matrices = [size**2 for size in sizes]
        waiting = MOMENTS_BYTES * sum(matrices)
        eliminating = max(ELIMINATION_BYTES * it + waiting - MOMENTS_BYTES * it for it in matrices)
        moments = replace(moments, sums=max(moments.sums + (waiting if ranks > 1 else 0), eliminating))
        pass_through = self._memory_of_pass(dims, ranks)
        return max(pass_through, moments, key=lambda it: it.total) if self.curvature else pass_through

    def _memory_of_pass(self, dims: Dimensions, ranks: int) -> Memory:
        tokens = self.windows * self.tokens
        head = HEAD_CHUNK_BYTES * (2 if self.student else 1)
        numbers = tokens * dims.intermediate_size
        # Gradients at h, gate and up; and h itself in a layer that runs again.
        portions = GATED_PORTIONS * min(ACCELERATOR_BYTES, 4 * numbers)
        backward = (3 + self.checkpointing) * numbers * self.itemsize + portions
        if self.weight_gradients and self.itemsize < 4:  # a linear layer's input and output gradient in float32
            backward = max(backward, 2 * numbers * self.itemsize + 4 * (numbers + tokens * dims.hidden_size))
        if self.squared_products:  # beside gradients at gate and up
            backward = max(backward, 2 * numbers * self.itemsize + squared_bytes(dims, self.tokens, self.itemsize))
        if self.coupled_products:
            backward = max(backward, coupled_bytes(dims, self.windows, self.tokens, self.itemsize))
        return Memory(
            weights=dims.parameters * self.itemsize / ranks,
            gathered=gathered_at_a_time(dims, self.itemsize, ranks),
            activations=tokens * self.activation_bytes(dims),
            scratch=max(head, backward) + tokens * dims.hidden_size * self.itemsize * (self.losses + 2 + self.student),
            sums=self.curvature_bytes(dims, ranks) + self.gradient_bytes(dims, ranks),
        )

    def activation_bytes(self, dims: Dimensions) -> int:
        """Bytes a token that stay until backward. The graph begins at the first layer's neurons, or with what its
        attention puts out; with gradients of weights, at what its linear layers put out.
        """
        first, kept = dims.intermediate_size * self.itemsize, self.layer_bytes(dims)
        if self.kv_groups:  # attention's output, what the norm after it reads, and the MLP's gate and up
            first += (dims.attention_size + dims.hidden_size + 2 * dims.intermediate_size) * self.itemsize + 4
        if self._sees_attention:  # all but the input of the norm before attention
            first = kept - dims.hidden_size * self.itemsize - 4
        elif self._sees_mlps and not self.kv_groups:
            first += ((2 + self._sees_student) * dims.intermediate_size + dims.hidden_size) * self.itemsize
        later = dims.num_layers - 1
        return first + (later * dims.hidden_size * self.itemsize + kept if self.checkpointing else later * kept)

    def layer_bytes(self, dims: Dimensions) -> int:
        """Bytes a token of one layer: norms' inputs, q, k, v and attention's output, gate and up; h of a student, or
        where there are gradients of weights, then also norms' outputs.
        """
        values = 2 * dims.hidden_size + 2 * (dims.num_heads + dims.num_key_value_heads) * dims.head_size
        values += (2 + (self.student or self._sees_mlps) + self._sees_student) * dims.intermediate_size
        values += (self._sees_mlps + self._sees_attention) * dims.hidden_size
        return values * self.itemsize + 4 * (2 + dims.num_heads)  # float32: norms' scales, log-sum-exp of each head

    def _sizes(self, dims: Dimensions) -> list[int]:
        """Channels that the output projection of each kind of units reads."""
        return [dims.intermediate_size, *([dims.attention_size] if self.kv_groups else [])]

    def _weights(self, dims: Dimensions) -> list[int]:
        """Sizes of one layer's weights whose gradients are summed."""
        return dims.layer_weights(attention=self.kv_groups) if self.weight_gradients else []

    def work(self, dims: Dimensions) -> Work:
        """Of one micro-batch: a forward, the head forward once and backward for each loss, the body's backwards.

        Gathered bytes are the most there can be where activations are checkpointed or a model does not stay gathered.
        """
        tokens, later_share = self.windows * self.tokens, (dims.num_layers - 1) / dims.num_layers
        down_projection = dims.hidden_size * dims.intermediate_size
        output_projection = dims.hidden_size * dims.attention_size
        first_layer = output_projection + 3 * down_projection if self.kv_groups else down_projection
        later_layers = dims.active_body_parameters - dims.active_layer_parameters
        attention = attention_flops(dims, self.tokens)
        forward = 2 * dims.active_body_parameters + attention
        # The head's forwards: once for all losses of the dense model; for a student its own and its teacher's.
        heads = 2 * dims.head_parameters * (bool(self.losses) + 2 * self.student)
        # ``activation_bytes`` says where the graph begins. Backward of flash attention: five products for forward's
        # two.
        backward_parameters = later_layers + first_layer
        backward = 2 * (backward_parameters + dims.head_parameters) + 2.5 * later_share * attention
        # Of a layer that runs again, nothing that backward needs comes after its neurons.
        rerun = 2 * (later_layers - (dims.num_layers - 1) * down_projection) + later_share * attention
        passes, backwards = 1 + self.student, self.losses + self.student
        reruns = backwards if self.checkpointing else 0
        gathered = passes * (2 * dims.head_parameters + dims.body_parameters)
        if self.checkpointing or not stays_gathered(dims):
            idle = dims.body_parameters - dims.active_body_parameters
            gathered += backwards * (backward_parameters + idle) + reruns * (later_layers + idle)
        flops = tokens * (passes * forward + heads + backwards * backward + reruns * rerun + self._gradient_flops(dims))
        return Work(flops, gathered * self.itemsize)

    def _gradient_flops(self, dims: Dimensions) -> float:
        """A token's, and of what backwards do more for them: first attention, and down projections that run again."""
        if not self._sees_mlps:
            return 0.0
        attended = 2.5 * self._sees_attention * attention_flops(dims, self.tokens) / dims.num_layers
        again = 2 * self.checkpointing * (dims.num_layers - 1) * dims.hidden_size * dims.intermediate_size
        weights = self.coupled_products * sum(dims.layer_weights(attention=False))
        weights += (self.weight_gradients + self.squared_products) * sum(dims.layer_weights(attention=self.kv_groups))
        return 2 * dims.num_layers * weights + (self.losses or self.student) * (attended + again)


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
    checkpointing: bool = False

    @classmethod
    def of(cls, settings: LoraTraining, tokens: int, distills: bool) -> Train:
        """What a stage with such settings does with rows of so many tokens."""
        return cls(
            rows=settings.rows_at_once,
            tokens=tokens,
            rank=settings.rank,
            dropout=settings.dropout > 0,
            itemsize=ITEMSIZE[settings.dtype],
            distills=distills,
        )

    def resized(self, rows: int) -> Train:
        """The same with so many rows in a micro-batch."""
        return replace(self, rows=rows)

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """On one of the ranks that model, LoRA weights and optimizer are sharded over."""
        tokens = self.rows * self.tokens
        # In float32: the weight, its gradient and two moments; and the weight that computes.
        lora = self.lora_parameters(dims) * (4 * 4 + self.itemsize)
        return Memory(
            weights=(dims.parameters * self.itemsize + lora) / ranks,
            gathered=gathered_at_a_time(dims, self.itemsize, ranks),
            activations=tokens * self.activation_bytes(dims, sharded=ranks > 1),
            scratch=self.logits_bytes(dims),
        )

    def logits_bytes(self, dims: Dimensions) -> int:
        """Of a micro-batch's head."""
        tokens = self.rows * self.tokens
        if self.distills:  # final hidden states of both models, and the gradient there
            return 2 * HEAD_CHUNK_BYTES + 3 * tokens * dims.hidden_size * self.itemsize
        # The logits, and in float32: themselves, their log-softmax and its gradient.
        return tokens * dims.vocabulary * (self.itemsize + 3 * 4)

    def activation_bytes(self, dims: Dimensions, *, sharded: bool) -> int:
        """Bytes a token that stay until backward: of all layers, or their inputs and one layer that runs again."""
        kept = self.layer_bytes(dims, sharded=sharded)
        if self.checkpointing:
            return dims.num_layers * dims.hidden_size * self.itemsize + kept
        return dims.num_layers * kept

    def lora_parameters(self, dims: Dimensions) -> int:
        """Of A and B of every projection."""
        hidden, inner = dims.hidden_size, dims.intermediate_size
        heads, groups = dims.num_heads * dims.head_size, dims.num_key_value_heads * dims.head_size
        sides = 2 * (hidden + heads) + 2 * (hidden + groups) + 3 * (hidden + inner)
        sides += 2 * sum(dims.ranks)  # of one of low rank, each factor gets an adapter
        return dims.num_layers * self.rank * sides

    def layer_bytes(self, dims: Dimensions, *, sharded: bool) -> int:
        """Bytes a token of one layer, as Hugging Face's layers keep them for backward, with DeepSpeed's linear layers
        where weights are sharded: those keep their inputs, frozen or not.
        """
        heads = dims.num_heads * dims.head_size
        norms = 2 * 4 * dims.hidden_size
        attention = 2 * (dims.num_heads + dims.num_key_value_heads) * dims.head_size * self.itemsize
        gated = 3 * dims.intermediate_size * self.itemsize
        if self.dropout:  # a dropped copy and a mask for each projection
            inputs = (5 * dims.hidden_size + heads + dims.intermediate_size) * (self.itemsize + 1)
            inputs += (2 * dims.hidden_size + dims.intermediate_size) * self.itemsize * sharded
        else:
            inputs = (2 * dims.hidden_size + dims.intermediate_size) * self.itemsize
        return norms + attention + gated + inputs

    def work(self, dims: Dimensions) -> Work:
        """Of one micro-batch: a forward, and a backward without gradients of frozen weights; a teacher's head.

        Where it doesn't distill, several pairs share a row, and a mask that keeps them apart takes away what attention
        saves where it is merely causal. What the first layer's attention reads gets no gradient.
        """
        matrices, active = (
            dims.body_parameters + dims.head_parameters,
            dims.active_body_parameters + dims.head_parameters,
        )
        teacher = 2 * dims.head_parameters if self.distills else 0
        attention = attention_flops(dims, self.tokens) * (1 if self.distills else 2)
        flops = 4 * active + teacher + 6 * self.lora_parameters(dims) + 3.5 * attention
        read = dims.head_size * (dims.num_heads + 2 * dims.num_key_value_heads) + 3 * self.rank
        flops -= 2 * dims.hidden_size * read
        gathered = 2 * matrices + dims.head_parameters
        if self.checkpointing:  # the layers' forward once more
            flops += 2 * dims.active_body_parameters + attention_flops(dims, self.tokens)
        return Work(self.rows * self.tokens * flops, gathered * self.itemsize)


# What is known to be bound by products in the compute dtype, or by gathers.
TimedJob = Importance | Train | Evaluate
# What has a layer at a time on each rank.
LayerPass = Refit | LowRank | Reference
Job = TimedJob | LayerPass | Generate


def fits(job: Job, dims: Dimensions, gpus: Gpus) -> bool:
    """Whether the job's peak leaves ``RESERVE`` of a GPU's memory free."""
    return job.memory(dims, gpus.ranks).total <= (1 - RESERVE) * gpus.memory
