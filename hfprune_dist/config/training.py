"""LoRA training: distillation of pruned models, and recovery."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hfprune_dist.config.section import Dtype, Length, Name, NonNegative, Positive, Section, TextSource

# Its limit is beyond any sensible value: AdamW's first step is ten times the rate, which float32 must hold.
LearningRate = Annotated[float, Field(gt=0, lt=1e37)]


class LoraTraining(Section):
    """Settings of LoRA training, on all attention and MLP projections (of mixtures of experts on attention's alone),
    which is then merged into the weights.
    """

    batch_size: Positive = 128
    """Rows per optimizer step, over all ranks together."""
    micro_batch_size: Positive = 1
    """Rows per forward pass of one rank; on GPUs, 4 are faster where they fit. If a step's rows are no multiple of this
    times the number of ranks, some ranks are idle for a part of it."""
    learning_rate: LearningRate = 4e-4
    """Peak learning rate; it decays to zero along a cosine."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    rank: Positive = 32
    """LoRA rank r."""
    alpha: Positive = 64
    """LoRA alpha; updates are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """LoRA dropout."""
    dtype: Dtype = "bfloat16"
    """Compute dtype; LoRA weights and optimizer states are always float32."""


class DistillationConfig(LoraTraining):
    """Training of methods that ``distill``. The rows are the calibration windows; the loss is KL(dense || pruned) at
    every token. The dense model's final hidden states are kept on disk: tokens x hidden_size numbers in ``dtype``.
    Warm-up takes at most a quarter of all steps.
    """

    batch_size: Positive = 16
    learning_rate: LearningRate = 1e-3
    warmup_steps: NonNegative = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class RecoveryConfig(TextSource, LoraTraining):
    """Fine-tuning after pruning. The defaults are the paper's recipe; rows are packed from several records each.

    A record with a field ``messages`` is a chat: a list of objects with ``role`` and ``content``, of any number of
    turns, formatted by the tokenizer's chat template, with loss on the assistant's turns only. All other records are
    pairs of an instruction and its response in Alpaca's template, which also takes a field ``input``, if there is one.
    """

    method: Literal["none", "lora"] = "lora"
    """lora: LoRA on all attention and MLP projections (of mixtures of experts on attention's alone), merged afterwards.
    none: no recovery."""
    dataset: Name | None = "MBZUAI/LaMini-instruction"
    instruction_field: str = "instruction"
    """Field that holds the instruction."""
    response_field: str = "response"
    """Field that holds the response; the loss is computed on its tokens only."""
    text_field: str = "response"
    """Without effect."""
    samples: Positive | None = None
    """Use only this many records: the first of a file, or of a data set once ``seed`` has shuffled it; null
    uses all of them."""
    sequence_length: Length = 1024
    """Records are packed into rows of this many tokens, and longer ones cut; attention does not cross them."""
    epochs: Annotated[float, Field(gt=0, lt=2**31)] = 2.0
    """Passes over the packed rows."""
    max_steps: Positive | None = None
    """Number of optimizer steps after which training stops; overrides epochs."""

    @model_validator(mode="after")
    def _has_two_fields(self) -> RecoveryConfig:
        if self.instruction_field == self.response_field:
            raise ValueError(f"instruction_field and response_field are both {self.response_field!r}")
        return self

    def steps(self, steps_per_epoch: int) -> int:
        """Number of optimizer steps: ``max_steps``, or the fewest that are at least ``epochs``."""
        exact = self.epochs * steps_per_epoch
        return self.max_steps or ceil(exact - 1e-9 * exact)  # the float 1.1 times 10 is more than 11


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Number of optimizer steps that an epoch is cut into."""
    return -(-rows // batch_size)


def rows_trained(rows: int, batch_size: int, steps: int) -> int:
    """Number of rows that ``steps`` optimizer steps see, with epochs cut into steps as by ``data.schedule``."""
    of_an_epoch = steps_per_epoch(rows, batch_size)
    epochs, part = divmod(steps, of_an_epoch)
    return epochs * rows + rows * part // of_an_epoch
