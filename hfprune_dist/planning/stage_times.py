"""Expected times of a plan's stages on given GPUs: counted work at the rates of ``rates``.

Products, gathers and the calls that start them overlap, and the longest of them counts. Added to it are Gram matrices
and solves (or copies to and from main memory, if those take longer), sums over ranks, the disk and the start of the
stage. Ranks wait for the one with the most windows. Reading and tokenizing text, waiting in a queue and work that is
repeated after a fault are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hfprune_dist.config.parameters import (
    DistillParameters,
    EfficiencyParameters,
    EvaluateParameters,
    ImportanceParameters,
    LoraPruneParameters,
    PruneParameters,
    RecoverParameters,
    ReferenceParameters,
)
from hfprune_dist.config.training import steps_per_epoch
from hfprune_dist.core.triangle import packed_size
from hfprune_dist.planning.evaluation_footprint import Evaluate
from hfprune_dist.planning.expected_metrics import ExpectedManifests
from hfprune_dist.planning.footprint import Job
from hfprune_dist.planning.gpu_needs import ITEMSIZE, Gpus
from hfprune_dist.planning.importance_footprint import Importance
from hfprune_dist.planning.known_sizes import TASKS, requests_of
from hfprune_dist.planning.layer_pass_work import forward_of_all, multiplied_numbers, summed_numbers, summing
from hfprune_dist.planning.model_shape import ModelShape
from hfprune_dist.planning.operations import NO_OPERATIONS, Operations
from hfprune_dist.planning.plan import Plan
from hfprune_dist.planning.rates import CALL_S, DISK, HASHING, HOST_COPY, MODULES, START_S
from hfprune_dist.planning.stage_costs import NOTHING, Cost, StageCosts, scored_weights
from hfprune_dist.planning.timing import Seconds, network_seconds, precise_seconds, product_rate, seconds
from hfprune_dist.planning.training_footprint import Train
from hfprune_dist.store.stage import Stage
from hfprune_dist.structures import KV_GROUPS

# Bytes of a number in exact sums of Gram matrices; in all such sums together, over windows that are fitted and held
# out, each reduced and then sent to all ranks; and in products with these matrices, which one rank sends to the others.
SUM_BYTES, ALL_SUMS_BYTES, ALL_PRODUCTS_BYTES = 8, 2 * 2 * 8, 2 * 8
# Bytes per gradient of a LoRA weight that ranks exchange: its sum over ranks, and the result sent back.
GRADIENT_BYTES = 2 * 4
# Bytes per LoRA weight that ranks gather for the scores of a step: the weight and its gradient.
FACTOR_BYTES = 2 * 4
NO_SECONDS = Seconds(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class StageTime:
    """The time that one stage is expected to take.

    Attributes:
        seconds: wall-clock time; None if the rate of its GPUs, or nearly all of its work, is not known.
        gpus: number of GPUs that it holds meanwhile.
        missing: what is not counted; empty if everything is.
    """

    seconds: float | None
    gpus: int
    missing: str = ""

    @property
    def hours(self) -> float | None:
        return None if self.seconds is None else self.seconds / 3600

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.gpus * self.seconds / 3600


@dataclass(frozen=True)
class _Load:
    """The work of the rank that has the most of a stage's work.

    Attributes:
        overlapping: products, gathers, calls.
        operations: of all ranks; only those other than products count here.
        windows: the rank's share of all windows.
        problems: its share of the problems that are solved.
        exchanged: seconds of sums over ranks.
        copied: bytes between its GPU and main memory.
        written: bytes of the artifact.
        missing: what is not counted.
    """

    overlapping: Seconds = NO_SECONDS
    operations: Operations = NO_OPERATIONS
    windows: float = 1.0
    problems: float = 1.0
    exchanged: float = 0.0
    copied: float = 0.0
    written: float = 0.0
    missing: str = ""

    def seconds(self, gpus: Gpus) -> float:
        """Time on GPUs, without reading and writing the disk before and after."""
        if self == _Load(written=self.written):  # nothing that needs their rate
            return 0.0
        precise = precise_seconds(self.operations, gpus, self.windows, self.problems)
        return self.overlapping.longest + max(precise, self.copied / HOST_COPY) + self.exchanged


class StageTimes:
    """Expected times of a plan's stages.

    Args:
        checkpointing: whether calibration recomputes activations in backward.
    """

    def __init__(self, plan: Plan, *, checkpointing: bool) -> None:
        self._plan = plan
        self._expected = ExpectedManifests(plan, checkpointing=checkpointing)
        self._costs = StageCosts(plan, self._expected.of)

    def of(self, stage: Stage, job: Job | None, gpus: Gpus | None, placed: Gpus | None) -> StageTime:
        """The expected time of one stage.

        Args:
            job: as it will run; None for a prune stage without a refit.
            gpus: of all its ranks; None if it has none, which suffices for a stage that only copies files.
            placed: the GPUs that hold one copy of the model.
        """
        held = 0 if gpus is None else gpus.ranks
        if isinstance(stage.params, PruneParameters) and self._costs.of(stage.id) == NOTHING:
            load: _Load | None = _Load(written=self._on_disk(stage))
        elif gpus is None or placed is None:
            return StageTime(None, held, "all of it: it has no GPUs in the profile")
        elif gpus.flops is None:
            return StageTime(None, held, "all of it: the profile has no gpu_tflops")
        else:
            load = self._load(stage, job, gpus, placed)
        if load is None:
            return StageTime(None, held, _unknown_of(stage))
        disk = (self._on_disk(stage) + load.written) * (1 / DISK + 1 / HASHING)
        return StageTime(START_S + disk + (load.seconds(gpus) if gpus is not None else 0.0), held, load.missing)

    def _load(self, stage: Stage, job: Job | None, gpus: Gpus, placed: Gpus) -> _Load | None:
        match stage.params, job:
            case ImportanceParameters() as params, Importance():
                return self._importance(stage, params, job, placed)
            case ReferenceParameters() | PruneParameters(), _:
                return self._layer_pass(stage, gpus)
            case DistillParameters() | RecoverParameters() | LoraPruneParameters(), Train():
                return self._training(stage, job, gpus, placed)
            case EvaluateParameters() as params, Evaluate():
                return self._evaluation(stage, params, job, gpus, placed)
            case EfficiencyParameters() as params, _:
                return self._generations(stage, params, gpus)
        raise AssertionError(f"{stage.id} was planned by another version of the code")

    def _importance(self, stage: Stage, params: ImportanceParameters, job: Importance, gpus: Gpus) -> _Load | None:
        cost = self._costs.of(stage.id)
        if cost is None or cost == NOTHING:
            return None if cost is None else _Load()
        shape, calibration = self._costs.shape(stage), params.calibration
        micro_batches = _ceil(calibration.samples, calibration.micro_batch_size)
        of_a_shard = min(calibration.shard_size, micro_batches)
        shards = _ceil(_ceil(micro_batches, of_a_shard), gpus.ranks)
        rounds = of_a_shard * shards
        share = min(1.0, rounds * calibration.micro_batch_size / calibration.samples)
        passed = _of_shape(job, shape, gpus) * rounds
        compute = cost.operations.products * share / product_rate(gpus, job.itemsize)
        load = _Load(replace(passed, compute=compute), cost.operations, share)
        weights = sum(sum(dims.layer_weights(attention=job.kv_groups)) for dims in shape.layers)
        reduced = SUM_BYTES * rounds * weights if job.weight_gradients else 0
        if not job.curvature:
            return replace(load, exchanged=network_seconds(reduced, gpus))
        kinds = 1 + job.kv_groups
        reduced += SUM_BYTES * rounds * len(shape.layers) * kinds * packed_size(shape.hidden_size)
        return replace(
            load,
            problems=_ceil(len(shape.layers), gpus.ranks) / len(shape.layers),
            exchanged=network_seconds(reduced + ALL_SUMS_BYTES * summed_numbers(shape, job.kv_groups), gpus),
            copied=_weights_bytes(shape, job.itemsize) + _states_bytes(shape, cost.tokens * share, job.itemsize),
        )

    def _layer_pass(self, stage: Stage, gpus: Gpus) -> _Load | None:
        """Load of passes layer by layer; their number follows from the counted operations."""
        cost = self._costs.of(stage.id)
        if cost is None:
            return None
        shape, params = self._costs.shape(stage), stage.params
        length, micro_batch = self._windows(stage)
        mine = _ceil(_ceil(cost.tokens, length * micro_batch), gpus.ranks)
        share = min(1.0, mine * micro_batch * length / cost.tokens)
        itemsize = ITEMSIZE[params.compute_dtype or "bfloat16"]
        # Copies of windows make a pass longer, and weights pass no more often.
        products = (cost.without_copies or cost.operations).products
        passes, passes_without_copies = (
            it / (cost.tokens * forward_of_all(shape, length)) for it in (cost.operations.products, products)
        )
        called = passes * mine * len(shape.layers) * MODULES * CALL_S
        compute = cost.operations.products * share / product_rate(gpus, itemsize)
        is_reference = isinstance(params, ReferenceParameters)
        return _Load(
            overlapping=Seconds(compute, 0.0, called),
            operations=cost.operations,
            windows=share,
            problems=_ceil(len(shape.layers), gpus.ranks) / len(shape.layers),
            exchanged=network_seconds(_of_grams(shape, stage, cost), gpus),
            copied=passes * _states_bytes(shape, cost.tokens * share, itemsize)
            + passes_without_copies * _weights_bytes(shape, itemsize),
            written=cost.tokens * shape.hidden_size * itemsize if is_reference else self._on_disk(stage),
        )

    def _windows(self, stage: Stage) -> tuple[int, int]:
        """Tokens per window, and windows per micro-batch."""
        match stage.params:
            case ReferenceParameters(text=text, micro_batch_size=windows) if text is not None:
                return text.sequence_length, min(windows, text.windows)
            case ReferenceParameters() | PruneParameters() as params:
                scored = self._plan.stages[stage.inputs["importance"].location].params
                assert isinstance(scored, ImportanceParameters)
                return scored.calibration.sequence_length, params.micro_batch_size or 1
        raise AssertionError(stage.kind)

    def _training(self, stage: Stage, job: Train, gpus: Gpus, placed: Gpus) -> _Load | None:
        expected = self._expected.of(stage.id)
        if expected is None or expected["metrics"].keys().isdisjoint({"steps", "tokens"}):
            return None
        match stage.params:
            case RecoverParameters(recovery=recovery) | LoraPruneParameters(recovery=recovery):
                batch_size, steps = recovery.batch_size, expected["metrics"]["steps"]
            case DistillParameters(distillation=distillation, passes=passes):
                rows = _ceil(expected["metrics"]["tokens"], job.tokens)
                each = steps_per_epoch(rows, distillation.batch_size)
                batch_size, steps = _ceil(rows, each), passes * each
            case _:
                raise AssertionError(stage.kind)
        shape = self._costs.shape(stage)
        lora = shape.mean(job.lora_parameters)
        load = _Load(
            overlapping=_of_shape(job, shape, placed) * (steps * _ceil(batch_size, job.rows * gpus.ranks)),
            exchanged=network_seconds(GRADIENT_BYTES * lora * steps, gpus),
            written=self._on_disk(stage),
        )
        if not isinstance(stage.params, LoraPruneParameters):
            return load
        cost = self._costs.of(stage.id)
        assert cost is not None, "what it trains on is known"
        scored = scored_weights(shape, stage.params) * job.itemsize if placed.ranks > 1 else 0
        gathered = network_seconds((FACTOR_BYTES * lora + scored) * steps, gpus)
        operations = replace(cost.operations, products=0.0)
        return replace(load, operations=operations, windows=1 / gpus.ranks, exchanged=load.exchanged + gathered)

    def _evaluation(
        self, stage: Stage, params: EvaluateParameters, job: Evaluate, gpus: Gpus, placed: Gpus
    ) -> _Load | None:
        """Load of held-out windows one by one, with both models' logits, and of requests in batches."""
        shape, dense = self._costs.shape(stage), self._plan.dense_folder(stage)
        is_dense = str(dense) == stage.inputs["model"].location
        total = NO_SECONDS
        references = [it for role, it in stage.inputs.items() if role.startswith("reference")]
        for reference in references:
            text = self._plan.stages[reference.location].params
            assert isinstance(text, ReferenceParameters) and text.text is not None
            window = _of_window(replace(job, sequences=1, tokens=text.text.sequence_length), shape, placed)
            rounds = _ceil(text.text.windows, gpus.ranks)
            total = _sum(total, NO_SECONDS if is_dense else window * rounds)
        known, unknown = requests_of(params)
        for task in known:
            batch = _of_shape(replace(job, sequences=params.batch_size, tokens=task.tokens), shape, placed)
            total = _sum(total, batch * _ceil(task.count, params.batch_size * gpus.ranks))
        missing = [f"documents of {', '.join(unknown)} (evaluation.limit bounds them)"] if unknown else []
        others = [task for task in params.tasks if task not in TASKS and task not in unknown]
        missing += [f"answers that a model writes for {', '.join(others)}"] if others else []
        return _Load(overlapping=total, missing="; ".join(missing))

    def _generations(self, stage: Stage, params: EfficiencyParameters, gpus: Gpus) -> _Load:
        """Load of both models in turn, on one rank: each new token takes at least one call of every module."""
        dense = self._costs.shape(stage)
        timed = 2 * (params.repeats + 1) * len(params.batch_sizes) * len(params.prompt_tokens)
        calls = timed * params.new_tokens * len(dense.layers) * MODULES * CALL_S
        lengths = sum(it + params.new_tokens for it in params.prompt_tokens)
        tokens = 2 * (params.repeats + 1) * sum(params.batch_sizes) * lengths
        products = 2 * tokens * dense.mean(lambda dims: dims.active_body_parameters + dims.head_parameters)
        return _Load(overlapping=Seconds(products / product_rate(gpus, ITEMSIZE[params.dtype]), 0.0, calls))

    def _on_disk(self, stage: Stage) -> float:
        """Bytes of the checkpoint that a stage reads, as if it were dense."""
        return self._expected.dense(stage).bytes_on_disk


def _unknown_of(stage: Stage) -> str:
    if isinstance(stage.params, RecoverParameters | LoraPruneParameters):
        place = stage.params.recovery.path or stage.params.recovery.dataset
        return f"all of it: instruction pairs of {place} (recovery.samples or max_steps tells)"
    return "all of it: its shape is not known"


def _of_shape(job: Importance | Train | Evaluate, shape: ModelShape, gpus: Gpus) -> Seconds:
    """Time of a micro-batch in a model whose layers may differ."""

    def mean(of: Callable[[Seconds], float]) -> float:
        return shape.mean(lambda dims: of(seconds(job, dims, gpus)))

    return Seconds(mean(lambda it: it.compute), mean(lambda it: it.network), mean(lambda it: it.launch))


def _of_window(job: Evaluate, shape: ModelShape, gpus: Gpus) -> Seconds:
    """Time to compare a window: a forward pass, and the dense model's logits, whose hidden states are on disk."""
    head = 2 * job.tokens * shape.layers[0].head_parameters / product_rate(gpus, job.itemsize)
    forward = _of_shape(job, shape, gpus)
    return replace(forward, compute=forward.compute + head)


def _of_grams(shape: ModelShape, stage: Stage, cost: Cost) -> float:
    """Bytes that ranks exchange of Gram matrices in passes layer by layer, of products with them if all ranks have the
    same problems, and in Gauss-Newton steps; the number of such passes follows from the counted operations.
    """
    params = stage.params
    if not isinstance(params, PruneParameters):
        return 0.0
    kv_groups = KV_GROUPS in params.structures
    exchanged = ALL_SUMS_BYTES * summed_numbers(shape, kv_groups)
    if params.refit in ("layerwise", "block") or params.allocation in ("plain", "searched"):
        exchanged += ALL_PRODUCTS_BYTES * multiplied_numbers(shape, kv_groups)
    operations = cost.without_copies or cost.operations  # copies add terms, but no sums
    passes = operations.float32 / (cost.tokens * summing(shape, kv_groups))
    return exchanged * passes + ALL_PRODUCTS_BYTES * cost.added_up


def _weights_bytes(shape: ModelShape, itemsize: int) -> float:
    """Bytes of all layers' weights, which a pass layer by layer copies."""
    return shape.mean(lambda dims: dims.body_parameters) * itemsize


def _states_bytes(shape: ModelShape, tokens: float, itemsize: int) -> float:
    """Bytes of a rank's hidden states, which a pass layer by layer copies to each layer and back."""
    return 2 * len(shape.layers) * tokens * shape.hidden_size * itemsize


def _sum(one: Seconds, other: Seconds) -> Seconds:
    """Time of two activities, one after the other: the longest part of each counts."""
    return Seconds(one.longest + other.longest, 0.0, 0.0)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
