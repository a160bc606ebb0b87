"""The memory and work that a job needs of GPUs, and the GPUs that it gets."""

from __future__ import annotations

from dataclasses import dataclass

from hfprune_dist.planning.rates import LINK

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
class Work:
    """What one micro-batch costs one rank.

    Attributes:
        flops: floating-point operations.
        gathered_bytes: bytes of whole parameters that ZeRO-3 gathers, of which a rank receives (ranks - 1) / ranks.
    """

    flops: float
    gathered_bytes: float


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a job runs on.

    Attributes:
        memory: bytes of one GPU.
        flops: nominal floating-point operations per second of one GPU in dense bfloat16 products.
        network: nominal bytes per second between two nodes; None: assumed not to be the limit.
        link: nominal bytes per second, one way, between a GPU and the others of its node.
    """

    nodes: int
    per_node: int
    memory: float
    flops: float | None = None
    network: float | None = None
    link: float = LINK

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node
