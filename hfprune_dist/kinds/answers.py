"""Answers: what the dense model responds to instructions, for recovery to learn.

Inputs: ``model``, and ``text`` where the instructions are in a file.
"""

from __future__ import annotations

from typing import ClassVar

from hfprune_dist.config.section import Dtype
from hfprune_dist.config.training import Training, TrainingText
from hfprune_dist.kinds.memory import ITEMSIZE, Need, Planned, StageParameters, generation

# The file in an artifact: JSON objects with the tokens of each question and answer, and both as text for people.
ANSWERS = "answers.jsonl"


class AnswersParameters(StageParameters):
    """Settings of answers; ``seed`` is 0 where neither the order of a data set nor a draw depends on it."""

    tokenizes: ClassVar[bool] = True
    batch_setting: ClassVar[str] = "recovery.sequence_length"

    recovery: TrainingText
    dtype: Dtype
    seed: int

    @classmethod
    def from_training(cls, training: Training, seed: int) -> AnswersParameters:
        text = TrainingText(**training.model_dump(include={*TrainingText.model_fields}))
        return cls(recovery=text, dtype=training.dtype, seed=0 if text.path and not text.answer_temperature else seed)

    def need(self, planned: Planned) -> Need:
        return generation(planned.dense, 1, self.recovery.sequence_length, ITEMSIZE[self.dtype])
