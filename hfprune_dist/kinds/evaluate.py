"""Evaluate: fidelity to a dense model on its references, and lm-eval tasks.

Inputs: ``model``; ``dense``; ``reference`` (and so on), one for each text; ``tasks`` and so on, the user's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hfprune_dist.config.schema import EvaluationConfig
from hfprune_dist.config.section import Dtype
from hfprune_dist.config.texts import FIRST, reference_role
from hfprune_dist.core.memory_limits import LOGITS_BYTES
from hfprune_dist.kinds.dimensions import Dimensions
from hfprune_dist.kinds.memory import FLOAT32, ITEMSIZE, Job, Memory, Planned, StageParameters, widest_of_a_token
from hfprune_dist.kinds.reference import ReferenceParameters

# Tokens of a request without examples, and of an example: few tasks have longer ones.
REQUEST_TOKENS, EXAMPLE_TOKENS = 1024, 512
# Examples where each task shows its own number.
USUAL_EXAMPLES = 5


class EvaluateParameters(StageParameters):
    """Settings of an evaluation: those of an ``EvaluationConfig`` that it depends on."""

    tokenizes: ClassVar[bool] = True
    dtype_setting: ClassVar[str | None] = "evaluation.dtype"
    batch_setting: ClassVar[str] = "evaluation.batch_size"

    tasks: list[str]
    num_fewshot: int | None
    add_bos_token: bool
    apply_chat_template: bool
    limit: int | None
    batch_size: int
    dtype: Dtype

    @classmethod
    def of(cls, evaluation: EvaluationConfig) -> EvaluateParameters:
        return cls(**evaluation.model_dump(exclude={"include_path", "fidelity"}))

    def job(self, planned: Planned) -> Evaluate:
        """Its texts, if there are several, differ in nothing that counts here."""
        reference = planned.source(reference_role(FIRST))
        assert isinstance(reference, ReferenceParameters) and reference.text is not None
        return Evaluate.of(self, reference.text.sequence_length, planned.dense.max_positions)


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
