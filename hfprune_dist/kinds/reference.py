"""Reference: a dense model's final hidden states on a text, which evaluations and distillations compare with.

Inputs: ``model``, and ``importance``, whose windows it is on, or ``text`` where the held-out text is a file.
"""

from __future__ import annotations

from typing import ClassVar

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.section import Dtype
from hfprune_dist.config.texts import FidelityConfig
from hfprune_dist.kinds.memory import ITEMSIZE, Need, Planned, Sizes, StageParameters, layer_by_layer


class ReferenceParameters(StageParameters):
    """Settings of a reference on held-out ``text`` or, if None, on an importance stage's windows.

    Its dtype is that of the stage that reads it.
    """

    tokenizes: ClassVar[bool] = True

    dtype: Dtype
    add_bos_token: bool | None = None
    text: FidelityConfig | None = None

    def need(self, planned: Planned) -> Need:
        if self.text is None:
            calibration = planned.source("importance").calibration
            samples, tokens = calibration.samples, calibration.sequence_length
        else:
            samples, tokens = self.text.windows, self.text.sequence_length
        return self.passes_over(planned.dense, samples, tokens, 1)

    def passes_over(self, checkpoint: Checkpoint, samples: int, tokens: int, at_once: int) -> Need:
        """The memory for so many windows in all, and at once."""
        model, itemsize = Sizes.from_checkpoint(checkpoint), ITEMSIZE[self.dtype]
        return layer_by_layer(model, at_once, tokens, itemsize, host=samples * tokens * model.hidden * itemsize)
