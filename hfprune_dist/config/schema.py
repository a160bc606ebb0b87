"""All settings of a sweep: sections, keys, types and defaults.

The text below each field gives its meaning and unit. ``python launch/sweep.py --help`` lists the keys that have a flag
of their own; all others are set with ``--set section.key=value`` or in a YAML file.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from hfprune_dist.config.method import EngineName, PruneConfig
from hfprune_dist.config.section import Dtype, LocalPath, Name, NonNegative, Positive, Section
from hfprune_dist.config.texts import CalibrationConfig, FidelityConfig
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.methods import CriterionName

Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]
# Trackers that can resume a run; these are also the names of their packages.
Tracker = Literal["tensorboard", "trackio", "wandb"]
# How ranks hold frozen weights: all of them each, a shard each, or whichever the free memory allows (auto).
Sharding = Literal["auto", "replicate", "zero3"]


def _once_each(values: list[Any]) -> list[Any]:
    shown = [f"{value:g}" if isinstance(value, float) else value for value in values]  # as tables name ratios
    repeated = sorted({value for value in shown if shown.count(value) > 1})
    if repeated:
        raise ValueError(f"{repeated[0]} is listed twice")
    return values


ONCE_EACH = AfterValidator(_once_each)


class ImportanceConfig(Section):
    """How neurons are scored."""

    criteria: list[CriterionName] = Field(default=[])
    """Scores to compute in addition to those that the methods need, all in one calibration pass: one forward, and one
    backward for each loss.

    configs/methods/README.md says what each measures, and its source. coupled_taylor_distilled is not for this list: it
    needs a method that chooses its student.
    """
    dtype: Dtype = "bfloat16"
    """Compute dtype of forward and backward; scores are accumulated in float64."""


class EvaluationConfig(Section):
    """lm-eval tasks, and fidelity to the dense model."""

    tasks: Annotated[list[str], ONCE_EACH] = Field(
        default=[
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
    )
    """lm-eval task names; the default is the paper's suite. If it is empty, only fidelity is measured."""
    include_path: LocalPath = None
    """Folder with further lm-eval task YAML files."""
    num_fewshot: NonNegative | None = 0
    """Number of examples in the prompt; null leaves it to each task."""
    add_bos_token: bool = True
    """Begin every sequence with the BOS token if the tokenizer itself puts one before a text (Llama's does, SmolLM2's
    doesn't). Applies to calibration windows too, unless set there."""
    apply_chat_template: bool = False
    """Format prompts with the tokenizer's chat template."""
    limit: Positive | None = None
    """Use only this many documents of each task, the first ones (for tests: such scores can't be published)."""
    batch_size: Positive = 8
    """Requests per forward pass of one rank; questions, where all choices of one share the forward of its context."""
    dtype: Dtype = "bfloat16"
    """Compute dtype."""
    fidelity: FidelityConfig = FidelityConfig()


class EfficiencyConfig(Section):
    """Speed and memory of generation, each pruned model measured in turn with its dense model.

    A measurement holds for one device and dtype, and has the dense and the pruned model in memory together on one rank.
    It is therefore off by default; on a cluster it holds for the profile's partition and constraint.
    """

    enabled: bool = False
    """Measure the dense models and each shape that the sweep makes, before recovery, which doesn't change shapes."""
    engine: Literal["vllm"] | None = None
    """An engine that generates (``runtime.engine_pythons`` says where it is), with ``batch_sizes`` of requests at once;
    null: plain transformers."""
    batch_sizes: Annotated[list[Positive], ONCE_EACH] = Field(default=[1, 8], min_length=1)
    """Numbers of sequences that are generated together; tables show the results for the largest."""
    prompt_tokens: Annotated[list[Positive], ONCE_EACH] = Field(default=[256], min_length=1)
    """Prompt lengths, in tokens; tables show the results for the longest."""
    new_tokens: Annotated[int, Field(ge=2, lt=2**31)] = 256
    """Tokens to generate for each sequence: the first from the prompt, all others one by one."""
    repeats: Positive = 5
    """Timed generations of each model, alternating between the two, after an untimed one; results are medians."""
    dtype: Dtype = "bfloat16"
    """Dtype of weights, computation and cache."""


class RuntimeConfig(Section):
    """How stages run; in no fingerprint: only an engine's version (``engine_pythons``) changes more than rounding."""

    ranks: Positive | None = None
    """Processes per stage; null: one per GPU, or 1 without a GPU."""
    threads_per_rank: Positive | None = None
    """CPU threads of each rank; null: OMP_NUM_THREADS if set, otherwise the usable cores divided by the ranks."""
    activation_checkpointing: bool = False
    """Importance: keep only the layers' inputs and run each layer again in backward; less memory, identical scores."""
    sharding: Sharding = "auto"
    """Wherever ranks run the whole model (prune only to check its layers): replicate it on every rank, shard it with
    ZeRO-3, or decide by the free memory (auto): whole wherever it fits. Ranks that train weights themselves
    (recovery.method full, parts) each have all of them, and always shard a teacher that runs beside."""
    save_every_steps: Positive = 50
    """Recovery: optimizer steps between snapshots."""
    collective_timeout_minutes: Annotated[int, Field(ge=1, le=366 * 24 * 60)] = 240
    """Ranks that wait longer than this for another one, or half an hour for it to start, end the stage. One that is
    lost ends it at once; this is for one that hangs, and longer than rank 0 ever works alone."""
    engine_pythons: dict[EngineName, Name] = Field(default={})
    """Engine -> path, or name in PATH, of a Python that has it; by default, the one that runs this. A ``vllm`` also
    writes the dense model's answers (``recovery.answers``)."""
    report_to: Annotated[list[Tracker], ONCE_EACH] = Field(default=[])
    """Experiment trackers to which recovery reports losses as it trains: one run for each stage."""

    def python_of(self, engine: EngineName) -> str:
        return self.engine_pythons.get(engine, sys.executable)


class ModelAlias(Section):
    """A short name for a model: a local checkpoint folder or a hub id."""

    path: LocalPath = None
    """Folder with a Hugging Face checkpoint (config.json, *.safetensors, tokenizer)."""
    hub_id: Name | None = None
    """Model id on the Hugging Face hub."""
    revision: str = "main"
    """Commit, tag or branch on the hub."""

    @model_validator(mode="after")
    def _has_one_source(self) -> ModelAlias:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("needs exactly one of path and hub_id")
        return self


class SweepConfig(Section):
    """The configuration of a sweep."""

    models: Annotated[list[Name], ONCE_EACH] = Field(default=[])
    """Aliases (configs/models/*.yaml, or the aliases section), folders of Hugging Face checkpoints, or hub ids
    (org/name, org/name@revision); a folder of that name takes precedence over the hub. A sweep needs at least one."""
    ratios: Annotated[list[Ratio], ONCE_EACH] = Field(default=[0.2, 0.3])
    """Removed parameters / all parameters of the model, for each pruned row; with none, only the dense model's rows."""
    rounds: list[Ratio] = Field(default=[])
    """Two or more ascending ratios, e.g. [0.3, 0.5]: each method (lorap, sdmprune and loraprune are refused) gets one
    more row for each recipe that trains, at the last of them, whose model is pruned to the first, trained, scored and
    pruned to the next, trained again, and so on. What is pruned to the first is shared with the row at that ratio."""
    methods: Annotated[list[str], ONCE_EACH] = Field(default=["hfprune", "surgeon-plain"], min_length=1)
    """Names of pruning methods (configs/methods/*.yaml) or YAML files with the keys of ``Method``. By default, the
    published method and the best one whose checkpoints plain transformers loads."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the calibration windows, of the order in which data sets are read, of scores and answers that draw random
    numbers, of the order of the training rows, of dropout and of the LoRA initialisation."""
    aliases: dict[str, ModelAlias] = Field(default={})
    """Further model aliases; they take precedence over those shipped in configs/models."""
    engines: Annotated[list[EngineName], ONCE_EACH] = Field(default=[])
    """Engines in which three prompts are run on each pruned checkpoint, in float32, and compared with transformers."""
    calibration: CalibrationConfig = CalibrationConfig()
    importance: ImportanceConfig = ImportanceConfig()
    prune: PruneConfig = PruneConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    efficiency: EfficiencyConfig = EfficiencyConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def calibrates_with_bos(self) -> bool:
        """Whether calibration windows begin with the tokenizer's BOS token."""
        own = self.calibration.add_bos_token
        return self.evaluation.add_bos_token if own is None else own

    @field_validator("rounds")
    @classmethod
    def _ascend(cls, rounds: list[float]) -> list[float]:
        if len(rounds) == 1 or rounds != sorted(set(rounds)):
            raise ValueError(f"{rounds} must be two or more ascending ratios, or []")
        return rounds
