"""The memory that a job needs of GPUs, and the GPUs that it gets."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of a number in each compute dtype.
ITEMSIZE = {"float32": 4, "bfloat16": 2}
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak.

    Attributes:
        weights: this rank's shards, and what training keeps for each of them.
        gathered: whole parameters of the layers being computed.
        activations: kept for backward, for all tokens of a micro-batch.
        scratch: temporary values of the head and of the loss on its logits; or of a layer's backward, if that is more.
        sums: sums over tokens, such as Gram matrices, with what is computed from them.
        in_transit: in passes layer by layer, what is on its way to or from main memory while the GPU computes.
    """

    weights: float
    gathered: float
    activations: float
    scratch: float
    sums: float = 0.0
    in_transit: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gathered + self.activations + self.scratch + self.sums + self.in_transit


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a job runs on.

    Attributes:
        memory: bytes of one GPU.
    """

    nodes: int
    per_node: int
    memory: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node
