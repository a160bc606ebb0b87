"""Memory of a calibration pass: a forward and a backward for each loss, and sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.gathering import gathered_at_a_time
from hfprune_dist.planning.gpu_needs import Memory
from hfprune_dist.planning.head_footprint import HEAD_CHUNK_BYTES
from hfprune_dist.planning.layer_pass_footprint import memory_of_layer_pass, pinned_bytes, tokens_of_a_rank
from hfprune_dist.planning.product_footprint import coupled_bytes
from hfprune_dist.planning.sum_footprint import SUM_BYTES, layer_sums_bytes, means_bytes

# core.memory_efficient: number of portions, in float32, that a gated MLP's backward holds.
GATED_PORTIONS = 7
# scoring.layer_sums, for each number of a total: in main memory while it is saved. core.elimination, for each number of
# a layer's Gram matrix: with what is computed from it but without pending products (384 numbers per neuron).
SAVED_BYTES, ELIMINATION_BYTES = 16, 32


@dataclass(frozen=True)
class Importance:
    """A calibration pass: ``windows`` of ``tokens`` at a time, with one backward for each of ``losses``.

    With ``curvature``, it also sums g g^T at the output of every MLP, each rank for its share of the layers; a pass
    layer by layer over all ``samples`` windows follows for their Gram matrices, without the whole model in memory. With
    ``kv_groups``, attention's outputs are treated like those of MLPs.
    With ``weight_gradients``, it sums the gradients of the weights that units own, distributed in the same way. With
    ``coupled_products``, it computes those of neurons' weights window by window: from the dense model's losses if there
    are any, otherwise from the student's.
    With a ``student``, the model runs again without some neurons, forward and backward; the dense model is the teacher.
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
    coupled_products: bool = False

    def resized(self, windows: int) -> Importance:
        """A copy with this many windows in a micro-batch."""
        return replace(self, windows=windows)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Main memory of one rank: to save a layer's matrix, or later for the hidden states of its windows."""
        saved = SAVED_BYTES * max([*self._weights(dims), self.curvature * dims.hidden_size**2])
        if not self.curvature:
            return saved
        assert self.samples is not None, "the pass layer by layer goes over all windows"
        hidden = tokens_of_a_rank(self.samples, self.windows, self.tokens, ranks) * dims.hidden_size * self.itemsize
        hidden += pinned_bytes(dims, self.windows * self.tokens, self.itemsize)
        return max(saved, hidden)

    def curvature_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Bytes of curvature on a rank, for each kind of unit."""
        kinds = len(self._sizes(dims)) if self.curvature else 0
        return layer_sums_bytes([dims.hidden_size**2] * kinds, dims.num_layers, ranks)

    def gradient_bytes(self, dims: Dimensions, ranks: int) -> int:
        """Bytes of weights' gradients on a rank."""
        return layer_sums_bytes(self._weights(dims), dims.num_layers, ranks)

    @property
    def _sees_mlps(self) -> bool:
        """Whether the inputs and output gradients of MLPs' linear layers are captured."""
        return self.weight_gradients or self.coupled_products

    @property
    def _sees_attention(self) -> bool:
        """Whether the inputs and output gradients of attention's linear layers are captured."""
        return self.kv_groups and self.weight_gradients

    @property
    def _sees_student(self) -> bool:
        """Whether what is captured in MLPs is a student's, whose h is kept both with and without its mask."""
        return self.coupled_products and not self.losses

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """Memory on one of the ranks that the model is sharded over: what the larger of the two passes needs."""
        sizes = self._sizes(dims)
        moments = memory_of_layer_pass(dims, self.windows * self.tokens, self.itemsize, sizes)
        # Both means of windows make that of all, for each kind. While matrices of one kind are processed, those of
        # others wait; on several ranks, those of another layer too, while this one's are summed.
        waiting = SUM_BYTES * sum(size**2 for size in sizes)
        summing = max(moments.sums, means_bytes(sizes) + waiting) + (waiting if ranks > 1 else 0)
        eliminating = waiting + max((ELIMINATION_BYTES - SUM_BYTES) * size**2 for size in sizes)
        moments = replace(moments, sums=max(summing, eliminating))
        pass_through = self._memory_of_pass(dims, ranks)
        return max(pass_through, moments, key=lambda it: it.total) if self.curvature else pass_through

    def _memory_of_pass(self, dims: Dimensions, ranks: int) -> Memory:
        tokens = self.windows * self.tokens
        head = HEAD_CHUNK_BYTES * (2 if self.student else 1)
        numbers = tokens * dims.intermediate_size
        # Gradients at h, gate and up, and h itself in a layer that runs again. Only gated MLPs use our own backward.
        portions = GATED_PORTIONS * min(ACCELERATOR_BYTES, 4 * numbers) * (dims.row_projections > 1)
        backward = (dims.mlp_matrices + self.checkpointing) * numbers * self.itemsize + portions
        if self.weight_gradients and self.itemsize < 4:  # a linear layer's input and output gradient in float32
            backward = max(backward, 2 * numbers * self.itemsize + 4 * (numbers + tokens * dims.hidden_size))
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
        """Bytes per token that are kept until backward. The graph begins at the first layer's neurons or, with KV
        groups, at its attention's output; with gradients of weights, at the outputs of its linear layers.
        """
        first, kept = dims.intermediate_size * self.itemsize, self.layer_bytes(dims)
        rows = dims.row_projections * dims.intermediate_size
        if self.kv_groups:  # attention's output, what the norm after it reads, and the MLP's gate and up
            first += (dims.attention_size + dims.hidden_size + rows + dims.routed_channels) * self.itemsize + 4
        if self._sees_attention:  # all but the input of the norm before attention
            first = kept - dims.hidden_size * self.itemsize - 4
        elif self._sees_mlps and not self.kv_groups:
            first += (rows + self._sees_student * dims.intermediate_size + dims.hidden_size) * self.itemsize
        later = dims.num_layers - 1
        return first + (later * dims.hidden_size * self.itemsize + kept if self.checkpointing else later * kept)

    def layer_bytes(self, dims: Dimensions) -> int:
        """Bytes per token of one layer: the norms' inputs; q, k, v and attention's output; gate and up; h for a student
        or an MLP without a gate; experts' outputs; with gradients of weights, h and the norms' outputs.
        """
        values = 2 * dims.hidden_size + 2 * (dims.num_heads + dims.num_key_value_heads) * dims.head_size
        without_gate = dims.row_projections == 1  # then it isn't our own backward, which recomputes h
        of_mlp = dims.row_projections + (self.student or self._sees_mlps or without_gate) + self._sees_student
        values += of_mlp * dims.intermediate_size
        values += (self._sees_mlps + self._sees_attention) * dims.hidden_size + dims.routed_channels
        return values * self.itemsize + 4 * (2 + dims.num_heads)  # float32: norms' scales, log-sum-exp of each head

    def _sizes(self, dims: Dimensions) -> list[int]:
        """Number of channels that the output projection of each kind of unit reads."""
        return [dims.intermediate_size, *([dims.attention_size] if self.kv_groups else [])]

    def _weights(self, dims: Dimensions) -> list[int]:
        """Sizes of one layer's weights whose gradients are summed."""
        return dims.layer_weights(attention=self.kv_groups) if self.weight_gradients else []
