"""LoRA training: distillation of pruned models, and recovery."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hfprune_dist.config.section import Dtype, Positive, PositiveOrAuto, Section, TextSource
from hfprune_dist.errors import UserError


class LoraTraining(Section):
    """How LoRA on all attention and MLP projections is trained, before it is merged."""

    batch_size: Positive = 128
    """Rows per optimizer step, over all ranks together."""
    micro_batch_size: PositiveOrAuto = "auto"
    """Rows per forward pass of one rank. auto: what suits the memory, and the rate if it is known, of the GPUs that it
    is planned for (1 where their memory isn't known), chosen by the first run in a folder and then part of the
    folder's configuration."""
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    """Peak learning rate; decays to zero along a cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
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
    """Compute dtype; LoRA weights and optimizer states are float32 in any case."""

    @property
    def rows_at_once(self) -> int:
        """``micro_batch_size``; 1 where nobody has chosen."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size


class DistillationConfig(LoraTraining):
    """How methods that ``distill`` train. The rows are the calibration windows, the loss is KL(dense || pruned) of
    every token. The dense model's final hidden states are kept on disk: tokens x hidden_size numbers in ``dtype``. If a
    step has fewer rows than there are ranks, some ranks are idle. Warm-up takes at most a quarter of all steps.
    """

    batch_size: Positive = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class RecoveryConfig(TextSource, LoraTraining):
    """Fine-tuning after pruning; the defaults are the paper's recipe. Rows are packed instruction pairs."""

    method: Literal["none", "lora"] = "lora"
    """lora: LoRA on all attention and MLP projections, merged afterwards. none: no recovery."""
    dataset: str | None = "MBZUAI/LaMini-instruction"
    instruction_field: str = "instruction"
    """Field that holds the instruction."""
    response_field: str = "response"
    """Field that holds the response; the loss is taken on its tokens only."""
    text_field: str = "response"
    samples: Positive | None = None
    """Number of instruction pairs that are used, from the first on; null uses all of them."""
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    """Pairs are packed into rows of this many tokens; attention does not cross pairs."""
    epochs: Annotated[float, Field(gt=0)] = 2.0
    """Passes over the packed rows."""
    max_steps: Positive | None = None
    """Number of optimizer steps after which training stops; overrides epochs."""

    @property
    def pair_fields(self) -> list[str]:
        """The fields that are read of each record."""
        return [self.instruction_field, self.response_field]

    def require_two_fields(self) -> None:
        """Check that instructions and responses are not the same texts.

        Raises:
            UserError: where they are.
        """
        if self.instruction_field == self.response_field:
            raise UserError(f"recovery.instruction_field and recovery.response_field are both {self.response_field!r}")

    def require_shared_evenly(self, world_size: int) -> None:
        """Check that so many ranks can share the rows of an optimizer step evenly.

        Raises:
            UserError: where they can't; the message tells which values work.
        """
        at_once = self.rows_at_once * world_size
        below = self.batch_size // at_once * at_once
        if below == self.batch_size:
            return
        most = self.batch_size // self.rows_at_once
        rank_counts = [n for n in range(1, most + 1) if self.batch_size % (n * self.rows_at_once) == 0]
        ranks = f", or the ranks to one of {', '.join(map(str, rank_counts))}" if rank_counts else ""
        raise UserError(
            f"recovery.batch_size {self.batch_size} isn't a multiple of recovery.micro_batch_size "
            f"{self.micro_batch_size} times {world_size} ranks; set batch_size to "
            f"{f'{below} or ' if below else ''}{below + at_once}{ranks}"
        )
