"""LoRAPrune: recovery that prunes, in place of a prune stage and a recovery.

Inputs: as of a recovery, with the dense model.
"""

from __future__ import annotations

from hfprune_dist.config.method import Method
from hfprune_dist.config.method_settings import Kinds
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.kinds.memory import Planned
from hfprune_dist.kinds.recover import RecoverParameters
from hfprune_dist.kinds.training import Train
from hfprune_dist.structures import kinds_among


class LoraPruneParameters(RecoverParameters):
    """Settings of fine-tuning that prunes, with those of ``PruneParameters`` that bound what it removes."""

    ratio: float
    structures: Kinds
    multiple_of: int
    tensor_parallel: int
    protect_first: int
    protect_last: int

    @classmethod
    def of(cls, config: SweepConfig, method: Method, ratio: float) -> LoraPruneParameters:
        """The training of a method with numbers, as ``with_numbers`` returns it."""
        (first, last), multiple_of = method.protected(), method.multiple_of
        assert isinstance(multiple_of, int), "planned with a number"
        return cls(
            recovery=config.recovery,
            seed=config.seed,
            ratio=ratio,
            structures=kinds_among(method.structures),
            multiple_of=multiple_of,
            tensor_parallel=method.split,
            protect_first=first,
            protect_last=last,
        )

    def protected(self) -> tuple[int, int]:
        """How many layers at the beginning, and how many at the end of the model, lose nothing."""
        return self.protect_first, self.protect_last

    def job(self, planned: Planned) -> Train:
        return Train.of(self.recovery, self.recovery.sequence_length, distills=False, masks=True)
