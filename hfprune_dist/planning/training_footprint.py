"""Memory of LoRA training: recovery, distillation, and pruning during recovery."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hfprune_dist.config.training import LoraTraining
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.gathering import gathered_at_a_time
from hfprune_dist.planning.gpu_needs import ITEMSIZE, Memory
from hfprune_dist.planning.head_footprint import HEAD_CHUNK_BYTES


@dataclass(frozen=True)
class Train:
    """LoRA training: ``rows`` of ``tokens`` at a time, rank ``rank`` on all linear layers of attention and MLP;
    in a mixture of experts, on those of attention alone.

    If it ``distills``, its head never holds the logits of all tokens, but has a dense model's in addition to its own.
    If it ``masks`` units (LoRAPrune), the inputs of output projections are multiplied by masks. Scores take less, after
    backward, than activations before it.
    """

    rows: int
    tokens: int
    rank: int
    dropout: bool
    itemsize: int = 2
    distills: bool = False
    checkpointing: bool = False
    masks: bool = False

    @classmethod
    def of(cls, settings: LoraTraining, tokens: int, distills: bool, *, masks: bool = False) -> Train:
        """The job of a stage with these settings on rows of ``tokens`` tokens."""
        return cls(
            rows=settings.rows_at_once,
            tokens=tokens,
            rank=settings.rank,
            dropout=settings.dropout > 0,
            itemsize=ITEMSIZE[settings.dtype],
            distills=distills,
            masks=masks,
        )

    def resized(self, rows: int) -> Train:
        """A copy with this many rows in a micro-batch."""
        return replace(self, rows=rows)

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """Memory on one of the ranks that the model, LoRA weights and optimizer are sharded over."""
        tokens = self.rows * self.tokens
        # In float32: the weight, its gradient and two moments; in the compute dtype: the weight.
        lora = self.lora_parameters(dims) * (4 * 4 + self.itemsize)
        return Memory(
            weights=(dims.parameters * self.itemsize + lora) / ranks,
            gathered=gathered_at_a_time(dims, self.itemsize, ranks),
            activations=tokens * self.activation_bytes(dims, sharded=ranks > 1),
            scratch=self.logits_bytes(dims),
        )

    def logits_bytes(self, dims: Dimensions) -> int:
        """Bytes that the head needs for a micro-batch."""
        tokens = self.rows * self.tokens
        if self.distills:  # final hidden states of both models, and the gradient there
            return 2 * HEAD_CHUNK_BYTES + 3 * tokens * dims.hidden_size * self.itemsize
        # The logits; in float32: the logits again, their log-softmax and its gradient.
        return tokens * dims.vocabulary * (self.itemsize + 3 * 4)

    def activation_bytes(self, dims: Dimensions, *, sharded: bool) -> int:
        """Bytes per token that are kept until backward: all layers', or their inputs and one layer that runs again."""
        kept = self.layer_bytes(dims, sharded=sharded)
        if self.checkpointing:
            return dims.num_layers * dims.hidden_size * self.itemsize + kept
        return dims.num_layers * kept

    def lora_parameters(self, dims: Dimensions) -> int:
        """Parameters of A and B of every projection that is trained (see ``checkpoints.lora_adapter``)."""
        sides = dims.adapted_inputs + dims.adapted_outputs
        sides += 0 if dims.is_mixture else dims.mlp_matrices * (dims.hidden_size + dims.intermediate_size)
        return round(dims.num_layers * self.rank * sides)

    def layer_bytes(self, dims: Dimensions, *, sharded: bool) -> int:
        """Bytes per token that one of Hugging Face's layers keeps for backward. If weights are sharded, DeepSpeed's
        linear layers are used, which keep their inputs whether they are frozen or not.
        """
        norms = 2 * 4 * dims.hidden_size
        attention = 2 * (dims.num_heads + dims.num_key_value_heads) * dims.head_size * self.itemsize
        gated = (2 * dims.row_projections - 1) * dims.intermediate_size * self.itemsize
        routed = dims.routed_channels * self.itemsize  # the weights that multiply them have a gradient
        # Attention keeps its output; whoever keeps the output projection's input keeps that one masked.
        masked = dims.attention_size * self.itemsize * (self.masks and (sharded or not self.dropout))
        return norms + attention + gated + routed + self._input_bytes(dims, sharded=sharded) + masked

    def _input_bytes(self, dims: Dimensions, *, sharded: bool) -> int:
        """Bytes per token of the inputs that linear layers keep in one layer: those that are trained, and the frozen
        ones if weights are sharded. Experts aren't linear layers.
        """
        hidden, in_mlp = dims.hidden_size, dims.hidden_size + dims.beside_experts
        if not self.dropout:
            return (hidden + in_mlp * (sharded or not dims.is_mixture)) * self.itemsize
        dropped = round(dims.adapted_inputs)  # a copy after dropout and a mask for each trained projection
        if not dims.is_mixture:
            dropped += dims.row_projections * hidden + dims.intermediate_size
        return dropped * (self.itemsize + 1) + (hidden + in_mlp) * self.itemsize * sharded
