"""What a user may set, in types.

Every field below says its meaning and unit; ``python launch/sweep.py --help`` names the ones with a flag of their own,
all others are reached with ``--set section.key=value``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hfprune_dist.errors import UserError

Dtype = Literal["float32", "bfloat16"]
# The keys of hfprune_dist.core.criteria.CRITERIA, which explains them; written out here since that one imports torch.
CriterionName = Literal[
    "entropy",
    "entropy_bfloat16",
    "entropy_squared",
    "cross_entropy",
    "fisher",
    "fisher_signs",
    "self_distillation",
    "activation",
    "surgeon",
    "magnitude",
    "random",
]
# Of these, the ones for which halves of the calibration windows can't be compared: they sum nothing over them, or round
# their sums (``Criterion.has_halves``).
WITHOUT_HALVES = frozenset({"entropy_bfloat16", "magnitude", "random"})
# Counts: beyond what any of them can be, a mistyped one would fail, or never end, in a stage.
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of keys: immutable, no conversions between types, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TextSource(Section):
    """Where text comes from: a local file (``path``) if given, else a data set of the Hugging Face hub."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """A file of text: .jsonl or .ndjson (one JSON object a line), .json (an array of objects, or one object after
    another), .csv or .tsv (the first line names the fields), .parquet, or any other UTF-8 file as plain text (one
    document). All but .parquet may be compressed (.gz, .bz2, .xz, .zst). A folder stands for the files in it whose
    names end so, .txt among them, in the order of their names."""
    dataset: str | None = None
    """Hub id of a data set; streamed, so only the documents that are used are downloaded."""
    name: str | None = None
    """Configuration name of the data set."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Commit of the data set; pin it for results that can be repeated."""
    text_field: str = "text"
    """Field that holds the text, in a file of records or a data set."""

    @model_validator(mode="after")
    def _has_a_source(self) -> TextSource:
        if self.path is None and self.dataset is None:
            raise ValueError("needs a path (a file of text) or a dataset (a hub id)")
        if self.path is not None and self.dataset not in (None, type(self).model_fields["dataset"].default):
            raise ValueError(f"path ({self.path}) and dataset ({self.dataset}) are both given; set one of them to null")
        return self


class CalibrationConfig(TextSource):
    """The text over which importance is accumulated."""

    dataset: str | None = "allenai/c4"
    name: str | None = "en"
    samples: Positive = 1024
    """Number of calibration windows."""
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens per window, the beginning-of-sequence token included."""
    micro_batch_size: Positive = 1
    """Windows per forward pass of one rank."""
    shard_size: Positive = 4
    """Micro-batches whose scores are summed before they are reduced over ranks and saved for a resume."""
    settled: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop before all samples are used, as soon as two halves of the windows so far agree on this share of the neurons
    to keep (looked at after 2, 4, 8, ... shards), by every criterion of the pass; null uses all samples. The curve is
    reported in any case: of activation and surgeon for the sums that their scores are made from. magnitude and random
    sum nothing, and entropy_bfloat16 rounds its sums: they have no curve and leave the decision to the others."""


class ImportanceConfig(Section):
    """How neurons are scored."""

    criteria: list[CriterionName] = []
    """Scores to compute besides those that the methods need, all in one calibration pass: one forward, and one
    backward for each loss.

    entropy: sum over tokens of |h * dH/dh| (HFPrune). entropy_bfloat16: the same, added up over micro-batches in
    bfloat16, to see what that does. entropy_squared: sum of squares of the same terms.
    cross_entropy: sum of |h * dCE/dh| (LLM-Pruner's first order). fisher: sum of (h * dlog p(y)/dh)^2 with y drawn
    from p. fisher_signs: the same expectation, from random signs. self_distillation: sum of |h * dKL/dh| in a student
    that lacks a tenth of its neurons, against the dense model (SDMPrune; another forward and backward). activation:
    norm of h times the norm of the down_proj column (Wanda-sp). surgeon: KL divergence in nats that the removal costs
    after all cheaper ones, when the neurons that stay are refitted (K-FAC; a second forward over the windows, layer by
    layer). magnitude: norm of the weights. random: a random order.
    """
    dtype: Dtype = "bfloat16"
    """Compute dtype of forward and backward; scores are accumulated in float64, but for entropy_bfloat16."""


Allocation = Literal["uniform", "global", "searched"]
Refit = Literal["none", "dense", "layerwise", "block"]


class Method(Section):
    """How scores become a smaller checkpoint. ``configs/methods`` has the ones that come with the project."""

    criterion: CriterionName
    """The score that selects."""
    allocation: Allocation = "uniform"
    """How the removed neurons are spread over layers. uniform: the same width everywhere. global: all layers compete
    by score; a criterion whose scores aren't in nats is divided by its layer's mean first. searched: both of these and
    some widths around the global ones are measured on calibration windows, and those closest to the dense model are
    taken. Where layers differ in width, checkpoints need trust_remote_code, or this package, to load."""
    floor: Annotated[float, Field(gt=0, le=1)] = 0.2
    """global, searched: the share of its neurons that a layer keeps at least."""
    protect_first: Annotated[int, Field(ge=0)] = 0
    """global, searched: so many of the first layers keep all their neurons."""
    protect_last: Annotated[int, Field(ge=0)] = 0
    """global, searched: so many of the last layers keep all their neurons."""
    refit: Refit = "none"
    """Least squares on down_proj, so that the kept neurons take over for the removed ones. dense: they make the dense
    MLP's outputs of the dense model's activations. layerwise: layer after layer, they make of the pruned model's own
    activations what the dense MLP would put out, and half of what is missing besides to the dense model's hidden
    states. block: as layerwise, and steps of Gauss-Newton on gate_proj, up_proj and down_proj; takes minutes, not
    seconds."""
    multiple_of: Positive = 1
    """Round intermediate_size to a multiple of this (64 or 128 suit GPU kernels)."""
    steps: Positive = 1
    """Prune in so many equal parts of the ratio. Before each but the first the pruned model is scored anew, on the same
    windows. A refit of kind ``dense`` is then on that model's activations; the others aim at the dense model in every
    step. uniform alone."""
    distill: Annotated[int, Field(ge=0)] = 0
    """At the end, so many passes over the calibration windows in which the pruned model learns the dense one's output
    distribution (see ``DistillationConfig``). No labels and no further text, but it is training."""

    @model_validator(mode="after")
    def _steps_are_uniform(self) -> Method:
        if self.steps > 1 and self.allocation != "uniform":
            raise ValueError(
                f"steps: {self.steps} needs allocation: uniform; a checkpoint whose layers differ in width can't be "
                "pruned again"
            )
        return self


class PruneConfig(Section):
    """Settings that win over those of every method; null leaves them to the method (see ``Method``)."""

    criterion: CriterionName | None = None
    allocation: Allocation | None = None
    floor: Annotated[float, Field(gt=0, le=1)] | None = None
    protect_first: Annotated[int, Field(ge=0)] | None = None
    protect_last: Annotated[int, Field(ge=0)] | None = None
    refit: Refit | None = None
    multiple_of: Positive | None = None
    steps: Positive | None = None
    distill: Annotated[int, Field(ge=0)] | None = None


class LoraTraining(Section):
    """How LoRA on all attention and MLP projections is trained, before it is merged."""

    batch_size: Positive = 128
    """Rows per optimizer step, over all ranks together."""
    micro_batch_size: Positive = 1
    """Rows per forward pass of one rank."""
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


class DistillationConfig(LoraTraining):
    """The training of methods that ``distill``: KL(dense || pruned) of every token of the calibration windows, which
    are the rows. The dense model's final hidden states are on disk: tokens x hidden_size numbers in ``dtype``.
    Ranks without a row of a step are idle in it. Warm-up takes a quarter of all steps at most.
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
    """Use the first so many instruction pairs; null uses all of them."""
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    """Pairs are packed into rows of this many tokens; attention does not cross pairs."""
    epochs: Annotated[float, Field(gt=0)] = 2.0
    """Passes over the packed rows."""
    max_steps: Positive | None = None
    """Stop after so many optimizer steps; overrides epochs."""

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
        at_once = self.micro_batch_size * world_size
        below = self.batch_size // at_once * at_once
        if below == self.batch_size:
            return
        most = self.batch_size // self.micro_batch_size
        rank_counts = [n for n in range(1, most + 1) if self.batch_size % (n * self.micro_batch_size) == 0]
        ranks = f", or the ranks to one of {', '.join(map(str, rank_counts))}" if rank_counts else ""
        raise UserError(
            f"recovery.batch_size {self.batch_size} isn't a multiple of recovery.micro_batch_size "
            f"{self.micro_batch_size} times {world_size} ranks; set batch_size to "
            f"{f'{below} or ' if below else ''}{below + at_once}{ranks}"
        )


class FidelityConfig(TextSource):
    """Held-out text on which a model is compared with its dense original, token by token."""

    dataset: str | None = "allenai/c4"
    name: str | None = "en"
    split: str = "validation"
    windows: Positive = 64
    """Number of held-out windows."""
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens per window, the beginning-of-sequence token included."""


class EvaluationConfig(Section):
    """lm-eval tasks, and fidelity to the dense model."""

    tasks: list[str] = [
        "arc_challenge",
        "arc_easy",
        "boolq",
        "crows_pairs_english",
        "openbookqa",
        "piqa",
        "race",
        "social_iqa",
        "truthfulqa_mc2",
        "winogrande",
    ]
    """lm-eval task names; the default is the paper's suite. May be empty: then only fidelity is measured."""
    include_path: Annotated[str, Field(min_length=1)] | None = None
    """Folder with further lm-eval task YAML files."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = 0
    """Examples in the prompt; null leaves it to each task."""
    add_bos_token: bool = True
    """Begin every sequence with the tokenizer's BOS token, here and in calibration."""
    apply_chat_template: bool = False
    """Format prompts with the tokenizer's chat template."""
    limit: Positive | None = None
    """Use only the first so many documents of each task (for tests: such scores can't be published)."""
    batch_size: Positive = 8
    """Requests per forward pass of one rank."""
    dtype: Dtype = "bfloat16"
    """Compute dtype."""
    fidelity: FidelityConfig = FidelityConfig()


class RuntimeConfig(Section):
    """How stages run. Nothing in this section changes a result, so nothing in it is part of a fingerprint."""

    ranks: Positive | None = None
    """Processes per stage; null: one per GPU, or 1 without a GPU."""
    threads_per_rank: Positive | None = None
    """CPU threads of each rank; null: OMP_NUM_THREADS if set, else the cores divided by the ranks."""
    activation_checkpointing: bool = False
    """Importance: keep layers' inputs only and run each layer again in backward; less memory, the same bits."""
    sharding: Literal["auto", "replicate", "zero3"] = "auto"
    """Evaluation: replicate the model on every rank, shard it with ZeRO-3, or decide by its size (auto)."""
    save_every_steps: Positive = 50
    """Recovery, distillation: optimizer steps between snapshots."""
    collective_timeout_minutes: Annotated[int, Field(ge=1, le=366 * 24 * 60)] = 10
    """A collective that takes longer than this ends the stage (a lost rank would hang the others)."""


class ModelAlias(Section):
    """A short name for a model: a local checkpoint folder or a hub id."""

    path: str | None = None
    """Folder with a Hugging Face checkpoint (config.json, *.safetensors, tokenizer)."""
    hub_id: str | None = None
    """Model id on the Hugging Face hub."""
    revision: str = "main"
    """Commit, tag or branch on the hub."""

    @model_validator(mode="after")
    def _has_one_source(self) -> ModelAlias:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("needs exactly one of path and hub_id")
        return self


class SweepConfig(Section):
    """Everything a sweep needs to know."""

    models: list[str] = Field(default=["llama", "qwen"], min_length=1)
    """Aliases (configs/models/*.yaml, or the aliases section), folders of Hugging Face checkpoints, or hub ids
    (org/name, org/name@revision); a folder of that name comes before the hub."""
    ratios: list[Ratio] = Field(default=[0.2, 0.3], min_length=1)
    """Removed parameters / all parameters of the model, for each pruned row."""
    methods: list[str] = Field(default=["surgeon-uniform-block"], min_length=1)
    """Names of pruning methods (configs/methods/*.yaml) or YAML files with the keys of ``Method``."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the calibration windows, the order of the training rows and the LoRA initialisation."""
    aliases: dict[str, ModelAlias] = {}
    """Further model aliases; they win over those shipped in configs/models."""
    calibration: CalibrationConfig = CalibrationConfig()
    importance: ImportanceConfig = ImportanceConfig()
    prune: PruneConfig = PruneConfig()
    distillation: DistillationConfig = DistillationConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @field_validator("models", "ratios", "methods")
    @classmethod
    def _no_duplicates(cls, values: list[Any]) -> list[Any]:
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"{repeated[0]} is listed twice")
        return values

    @field_validator("ratios")
    @classmethod
    def _are_told_apart(cls, ratios: list[float]) -> list[float]:
        labels = [f"{ratio:g}" for ratio in ratios]
        for label, ratio in zip(labels, ratios, strict=True):
            if labels.count(label) > 1:
                raise ValueError(f"{ratio} and another one are both called {label}")
        return ratios
