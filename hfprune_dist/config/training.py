"""Training after pruning: on which text, of which weights, towards what, and for how long."""

from __future__ import annotations

import re
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_serializer, model_validator

from hfprune_dist.config.section import Dtype, Length, Name, NonNegative, Positive, PositiveOrAuto, TextSource
from hfprune_dist.config.texts import TextName

# Its limit is beyond any sensible value: AdamW's first step is ten times the rate, which float32 must hold.
LearningRate = Annotated[float, Field(gt=0, lt=1e37)]
WeightDecay = Annotated[float, Field(ge=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
# Parts of a model by name.
Part = Annotated[str, Field(pattern=r"^(lm_head|embeddings|norms|last_[1-9][0-9]{0,3}_layers)$")]
# A warm-up takes at most one of so many steps: if all were warm-up, the only one would have a learning rate of 0.
STEPS_PER_WARMUP_STEP = 4
# Settings of how long a training is; each overrides those after it.
LENGTHS = ("max_steps", "tokens", "epochs")
_THOUSANDS = {"k": 10**3, "M": 10**6, "B": 10**9}


def _token_count(value: object) -> object:
    """A count that may be written as 300k, 20M or 1.5B."""
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kMB])", value) if isinstance(value, str) else None
    return round(float(parts[1]) * _THOUSANDS[parts[2]]) if parts else value


TokenCount = Annotated[int, BeforeValidator(_token_count), Field(ge=1, lt=2**63)]


class TrainingText(TextSource):
    """What a training reads."""

    text: Literal["instructions", "documents", "calibration"] = "instructions"
    """What is read. instructions: pairs and chats; a record with a field ``messages`` is a chat: a list of objects with
    ``role`` and ``content``, of any number of turns, formatted by the tokenizer's chat template, with loss on the
    assistant's turns only; all other records are pairs of an instruction and its response in Alpaca's template, which
    also takes a field ``input``, if there is one. documents: any text, in ``text_field`` of a path or a dataset that
    must be given. calibration: the windows that the model was pruned with; the keys of a text are without effect then,
    and so is sequence_length."""
    dataset: Name | None = "MBZUAI/LaMini-instruction"
    instruction_field: str = "instruction"
    """Field that holds the instruction."""
    response_field: str = "response"
    """Field that holds the response; the loss is computed on its tokens only."""
    answers: Literal["given", "dense"] = "given"
    """Whose responses to instructions are learnt. given: the text's. dense: the dense model's, written once for all of
    the model's rows (a data set needs ``samples``), by vLLM if ``runtime.engine_pythons`` names one and it loads the
    model on one GPU, else by transformers; the text's own aren't read, and a chat stops where its first would come. An
    answer takes up to half of sequence_length; one cut short has no end token, and longer instructions are left out."""
    answer_temperature: Annotated[float, Field(ge=0)] = 0.0
    """answers dense: the temperature at which tokens are drawn; 0 takes the most likely."""
    samples: Positive | None = None
    """Use only this many records: the first of a file, or of a data set once ``seed`` has shuffled it; null uses all of
    them, or of documents as many as hold ``tokens``."""
    sequence_length: Length = 1024
    """Records are packed into rows of this many tokens, and longer instructions cut, longer documents divided;
    attention does not cross them."""

    @property
    def answer_tokens(self) -> int:
        return ceil(self.sequence_length / 2)


class Recipe(TrainingText):
    """A training: of which weights, on which text, towards what, and for how long."""

    method: Literal["none", "lora", "full", "parts"] = "lora"
    """Which weights are trained. lora: LoRA on all attention and MLP projections (of mixtures of experts on attention's
    alone), merged afterwards. full: all of them. parts: those named in ``parts``. none: no training, whatever the other
    keys say. With full and parts, each rank has the whole model, ranks share the optimizer, and mixtures of experts are
    refused."""
    parts: list[Part] = Field(default=["lm_head", "last_3_layers"], min_length=1)
    """method parts: lm_head (with the embeddings, if they are tied to it), embeddings, norms, last_N_layers (all that
    pruning has left, if these are fewer)."""
    objective: Literal["auto", "labels", "distill"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """What is learnt. labels: the next token of the text; of instructions, of responses only. distill: the dense
    model's distribution of that token, by KL(dense || model); the dense model gets no row of its own then, since it
    would learn from itself. A number: that weight on the divergence, and the rest on labels. auto: distill after
    methods that refit weights, which labels would move away from the dense model again; labels after others, for the
    dense model, and in ``recipes``. The dense model's hidden states are kept on disk for calibration windows, if these
    are few, and computed beside the model's otherwise."""
    epochs: Annotated[float, Field(gt=0, lt=2**31)] = 2.0
    """Passes over the rows, if neither tokens nor max_steps is set."""
    tokens: TokenCount | None = None
    """Tokens to train on, where a row counts each time that it is seen: 300k, 20M, 1.5B; the last step is a whole one;
    overrides epochs."""
    max_steps: Positive | None = None
    """Number of optimizer steps after which training stops; overrides epochs and tokens."""
    batch_size: Positive | None = None
    """Rows per optimizer step, over all ranks together; null: 128 with objective labels, 16 otherwise."""
    micro_batch_size: PositiveOrAuto = "auto"
    """Rows per forward pass of one rank. auto: on a CPU 1; on GPUs as many as keep them busy and fit the memory that is
    free when training begins. The manifest has the number, and training that is resumed keeps it. If a step's rows are
    no multiple of it times the number of ranks, some ranks are idle for a part of it. With dropout, another number
    drops other activations."""
    learning_rate: LearningRate | None = None
    """Peak learning rate; it decays to zero along a cosine. null: 4e-4 for lora on labels, 1e-3 for lora that distills,
    1e-4 for full and parts."""
    warmup_steps: NonNegative | None = None
    """Optimizer steps of linear warm-up, at most a quarter of all steps; null: 0 with objective labels, 4 otherwise."""
    weight_decay: WeightDecay | None = None
    """AdamW weight decay of matrices (norms and biases have none); null: 0 for lora, 0.05 for full and parts."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm, which is that of all of them together."""
    rank: Positive = 32
    """LoRA rank r."""
    alpha: Positive = 64
    """LoRA alpha; updates are scaled by alpha / rank."""
    dropout: Dropout | None = None
    """LoRA dropout; null: 0.05 with objective labels, 0 otherwise."""
    evaluate_every: TokenCount | None = None
    """Every so many tokens, and at the end, KL and perplexity on the first text of evaluation.fidelity go into the loss
    curve's file, and the report's chart of quality against tokens. null: not before the evaluation."""
    patience: Positive | None = None
    """Training ends early after so many of these evaluations in a row without a lower KL, on the text whose KL rows
    report; null: never."""
    dtype: Dtype = "bfloat16"
    """Compute dtype, to which weights are rounded when training begins; the optimizer's weights and states are float32
    from there on."""

    def complete(self) -> Training:
        """The training, with a value for every setting, and without those that have no effect."""
        learns, lora = self.objective in ("auto", "labels"), self.method == "lora"
        settings = self.model_dump(exclude={"recipes"}) | ({"objective": "labels"} if learns else {})
        chosen: dict[str, Any] = {
            "batch_size": 128 if learns else 16,
            "learning_rate": (4e-4 if learns else 1e-3) if lora else 1e-4,
            "warmup_steps": 0 if learns else 4,
            "weight_decay": 0.0 if lora else 0.05,
            "dropout": 0.05 if learns else 0.0,
        }
        idle = set() if lora else {"rank", "alpha", "dropout"}
        idle |= set() if self.method == "parts" else {"parts"}
        idle |= {"instruction_field", "response_field"} if self.text != "instructions" else {"text_field"}
        idle |= {"response_field"} if self.answers == "dense" else {"answer_temperature"}
        idle |= {"epochs"} if self.tokens or self.max_steps else set()
        idle |= {"tokens"} if self.max_steps and self.text != "documents" else set()
        if self.text == "calibration":
            idle |= {*TextSource.model_fields, "samples", "sequence_length"}
        given = {name: value for name, value in settings.items() if name not in idle and value is not None}
        return Training(**{name: value for name, value in chosen.items() if name not in idle} | given)


class Training(Recipe):
    """A recipe in which every setting has a value."""

    objective: Literal["labels", "distill"] | Annotated[float, Field(gt=0, lt=1)] = "labels"
    batch_size: Positive = 128
    learning_rate: LearningRate = 4e-4
    warmup_steps: NonNegative = 0
    weight_decay: WeightDecay = 0.0
    dropout: Dropout = 0.05

    @model_validator(mode="after")
    def _is_whole(self) -> Training:
        pairs = Recipe.model_fields["dataset"].default
        if self.answers == "given" and self.instruction_field == self.response_field:
            raise ValueError(f"instruction_field and response_field are both {self.response_field!r}")
        if self.text == "documents" and (self.dataset, self.text_field) == (pairs, "text"):
            raise ValueError(f"documents need a path or a dataset; {pairs}, the default, holds instructions")
        if self.text == "documents" and self.dataset and not self.tokens and not self.samples:
            raise ValueError("documents of a data set have no end: set tokens (or samples)")
        if self.answers == "dense" and self.text != "instructions":
            raise ValueError(f"answers dense: text {self.text} has no instructions; set text or answers otherwise")
        if self.answers == "dense" and self.dataset and not self.samples:
            raise ValueError("answers dense answers all records of a data set, however few are trained on: set samples")
        if self.patience and not self.evaluate_every:
            raise ValueError("patience counts evaluations on the way: set evaluate_every, or leave patience out")
        return self

    @property
    def teacher_share(self) -> float:
        """Weight of the divergence from the dense model in the loss."""
        return {"labels": 0.0, "distill": 1.0}.get(self.objective, self.objective)  # type: ignore[arg-type]

    @property
    def least_at_once(self) -> int:
        """Rows per forward pass: the least, if memory is yet to decide."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def row_name(self) -> str:
        """What a row is called in the column of recoveries, if its recipe has no name."""
        answers = "-answers" if self.answers == "dense" else ""
        return self.method + answers + {"labels": "", "distill": "-distill"}.get(str(self.objective), "-mixed")

    def row_settings(self) -> dict[str, Any]:
        """The settings that decide what is in the rows, with the path of their text, if that is a file."""
        limit = {"tokens"} if self.text == "documents" else set()
        return self.model_dump(include={*TrainingText.model_fields, *limit})

    def steps(self, rows: int, per_epoch: int, sequence_length: int) -> int:
        """Number of optimizer steps on so many rows, so many steps an epoch: ``max_steps``, or the fewest that make up
        ``tokens`` or ``epochs``.
        """
        if self.max_steps:
            return self.max_steps
        if self.tokens:  # an epoch's steps differ by a row
            needed = -(-self.tokens // sequence_length)
            return -(-needed * per_epoch // rows)
        exact = self.epochs * per_epoch
        return ceil(exact - 1e-9 * exact)  # the float 1.1 times 10 is more than 11


class RecoveryConfig(Recipe):
    """Training after pruning, of the dense model too. The defaults are the paper's recipe."""

    recipes: Annotated[dict[TextName, Recipe], Field(min_length=1)] | None = None
    """Several trainings instead of one, each with its rows in the table, under names of your choice: what a recipe sets
    takes the place of the section's settings, e.g. {lora: {}, full: {method: full, tokens: 20M}}; one with
    ``method: none`` has the rows without training. With the section's own ``method: none``, nothing is trained."""

    @field_serializer("recipes")
    def _as_given(self, recipes: dict[str, Recipe] | None) -> dict[str, Any] | None:
        """What is not set in a recipe is left to the section when the configuration is read again."""
        return recipes and {name: recipe.model_dump(exclude_unset=True) for name, recipe in recipes.items()}

    @model_validator(mode="after")
    def _is_possible(self) -> RecoveryConfig:
        self.trainings()
        return self

    def trainings(self, after_refit: bool = False) -> dict[str, Training | None]:
        """Name of each recipe -> its training; None for rows without one.

        Args:
            after_refit: whether it follows a method that refits weights.
        """
        if self.method == "none":
            return {"none": None}
        found: dict[str, Training | None] = {}
        evaluates = self.evaluate_every or any(recipe.evaluate_every for recipe in (self.recipes or {}).values())
        only = Recipe(objective="distill") if after_refit and self.objective == "auto" else Recipe()
        for name, recipe in (self.recipes or {"": only}).items():
            own = recipe.model_dump(exclude_unset=True)
            # A recipe with a text of its own takes none of the section's; one without evaluations no patience that is
            # for others.
            others = {"recipes", *(TextSource.model_fields if {"path", "dataset"} & own.keys() else ())}
            first_own = next((place for place, name in enumerate(LENGTHS) if name in own), 0)
            others |= set(LENGTHS[:first_own])  # which would override the recipe's own
            others |= {"patience"} if evaluates and not own.get("evaluate_every", self.evaluate_every) else set()
            try:
                whole = Recipe(**self.model_dump(exclude=others) | own)
                training = None if whole.method == "none" else whole.complete()
            except ValidationError as error:
                told = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"recipes.{name}: {told}" if name else told) from None
            if name in ("own", "via") or (name == "none" and training is not None):
                raise ValueError(f"recipes.{name}: in tables this word means something else; choose another name")
            row = "none" if training is None else name or training.row_name
            if row in found:
                raise ValueError(f"recipes.{name}: another recipe has method none already; leave one of them out")
            found[row] = training
        return found


def layers_of(part: str) -> int:
    """The number of layers that a part of a model stands for."""
    return int(part.split("_")[1]) if part.startswith("last_") else 0
