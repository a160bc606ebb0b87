"""Evaluate: fidelity to a dense model on its references, and lm-eval tasks.

Inputs: ``model``; ``dense``; ``reference`` (and so on), one for each text; ``tasks`` and so on, the user's own.
"""

from __future__ import annotations

from typing import ClassVar

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.schema import EvaluationConfig
from hfprune_dist.config.section import Dtype
from hfprune_dist.config.texts import FIRST, reference_role
from hfprune_dist.core.memory_limits import LOGITS_BYTES
from hfprune_dist.kinds.memory import ITEMSIZE, Need, Planned, Sizes, StageParameters, logits_bytes, whole_forward

# Tokens of a request without examples, and of an example: few tasks have longer ones.
REQUEST_TOKENS, EXAMPLE_TOKENS = 1024, 512
# Examples where each task shows its own number.
USUAL_EXAMPLES = 5


class EvaluateParameters(StageParameters):
    """Settings of an evaluation: those of an ``EvaluationConfig`` that it depends on."""

    tokenizes: ClassVar[bool] = True
    batch_setting: ClassVar[str] = "evaluation.batch_size"

    tasks: list[str]
    num_fewshot: int | None
    add_bos_token: bool
    apply_chat_template: bool
    limit: int | None
    batch_size: int
    dtype: Dtype

    @classmethod
    def from_config(cls, evaluation: EvaluationConfig) -> EvaluateParameters:
        return cls(**evaluation.model_dump(exclude={"include_path", "fidelity"}))

    def need(self, planned: Planned) -> Need:
        """Its texts, if there are several, differ in nothing that counts here."""
        return self.forwards(planned.dense, planned.source(reference_role(FIRST)).text.sequence_length)

    def forwards(self, checkpoint: Checkpoint, window: int) -> Need:
        """The memory of requests of tasks, and of windows of text, one by one. Requests may have all positions of the
        model, examples included; then fewer run at a time (``LOGITS_BYTES``), but at least one.
        """
        model, itemsize = Sizes.from_checkpoint(checkpoint), ITEMSIZE[self.dtype]
        longest = REQUEST_TOKENS + EXAMPLE_TOKENS * (USUAL_EXAMPLES if self.num_fewshot is None else self.num_fewshot)
        positions = checkpoint.max_positions or longest
        at_once = max(LOGITS_BYTES // (model.vocabulary * logits_bytes(itemsize)), min(longest, positions))
        requests = min(self.batch_size * positions, at_once) if self.tasks else 0
        return whole_forward(model, max(requests, window), itemsize)
