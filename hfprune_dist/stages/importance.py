"""Importance: score every unit over the calibration windows, on a model whole on each rank, or sharded over all.

Any number of criteria share the pass: one forward, one pass over the logits, one backward for each loss; a student's
loss adds a forward. Windows are cut into fixed shards, whatever the number of ranks; ranks work on consecutive shards,
and the shards' sums are added in shard order. So first-order sums have the same bits on any number of ranks with
as many threads each, and a resumed stage continues at a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.read_tensors import scored_layer
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.core.criterion import Criterion, ScoredLayer, losses_of
from hfprune_dist.data.windows import load_windows, save_windows
from hfprune_dist.distributed.frozen_model import choose_sharding
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.layer_work import Turns, unfinished, up_to_last
from hfprune_dist.distributed.sums import Grams, explaining
from hfprune_dist.errors import UserError, naming
from hfprune_dist.kinds.importance import Calibration
from hfprune_dist.methods import CRITERIA
from hfprune_dist.methods.sdmprune import student_keeps
from hfprune_dist.scoring.calibration_pass import cut_into_shards, run_pass
from hfprune_dist.scoring.layer_sums import Size
from hfprune_dist.scoring.shard_scorer import GivenStudent, ShardScorer
from hfprune_dist.scoring.shard_sums import Accumulation, KindSizes
from hfprune_dist.stages.calibration_windows import Context, prepare_windows
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.score_names import SCORES, score_name, scores_of_layers
from hfprune_dist.structures.units import Units

PARTIAL = "partial.safetensors"


def run(context: Context) -> None:
    """Write ``importance.safetensors`` and ``windows.safetensors``."""
    checkpoint = open_checkpoint(context.input_path("model"))
    criteria = [CRITERIA[name] for name in context.params.criteria]
    documents = prepare_windows(context)
    windows_ST = load_windows(context.work)
    observing = [criterion for criterion in criteria if criterion.observes != "nothing"]
    totals = _accumulate(context, checkpoint, windows_ST, observing)
    scores = _score_layers(context, checkpoint, criteria, totals, windows_ST)
    draft = context.open_draft()

    def write() -> None:
        with naming(draft / SCORES):
            save_file(scores.read(), draft / SCORES)
        save_windows(windows_ST, draft)

    context.world.on_rank0(write)
    losses = [loss for loss in losses_of(criteria) if loss.in_nats]
    means = {f"mean_{loss.name}_nats": totals.losses[loss.name] / len(windows_ST) for loss in losses}
    context.commit(draft, {"tokens": windows_ST.numel(), **means, **documents})


def _scored_units(context: Context, checkpoint: Checkpoint) -> dict[str, Units]:
    """Kind -> its units, neurons first."""
    return {units.kind: units for units in checkpoint.pruned_kinds(context.params.structures)}


def _accumulate(
    context: Context, checkpoint: Checkpoint, windows_ST: Tensor, criteria: Sequence[Criterion]
) -> Accumulation:
    """Add up all shards; if no criterion sums anything, there are none, and no model is loaded."""
    settings = context.params.calibration
    windows = len(windows_ST) if criteria else 0
    shards = cut_into_shards(windows, settings.micro_batch_size, settings.shard_size)
    hidden_size = checkpoint.config["hidden_size"]
    sizes = {
        kind: KindSizes(units.counts, units.channels_per_unit, hidden_size)
        for kind, units in _scored_units(context, checkpoint).items()
    }
    totals = Accumulation(
        criteria,
        sizes,
        len(shards),
        context.work / PARTIAL,
        context.world,
        weights=_weights_of_units(context, checkpoint, criteria),
    )

    def load() -> ShardScorer:
        return _scorer(context, checkpoint, windows_ST, criteria, totals)

    def report(done: int) -> None:
        context.progress.update("calibration", done, len(shards))

    def after_round() -> None:
        context.interruption.stop_if_agreed(context.world)

    run_pass(shards, totals, load, before_round=report, after_round=after_round)
    report(len(shards))
    return totals


def _weights_of_units(context: Context, checkpoint: Checkpoint, criteria: Sequence[Criterion]) -> dict[str, list[Size]]:
    """Name within a layer -> size [out, in] in each layer; none if no criterion uses their gradients."""
    if not any(criterion.observes == "weight_gradients" for criterion in criteria):
        return {}
    tensors, layers = checkpoint.tensors, range(checkpoint.num_layers)
    return {
        name: [tensors[units.tensor(layer, name)].shape for layer in layers]
        for units in _scored_units(context, checkpoint).values()
        for name in units.weights
    }


def _scorer(
    context: Context,
    checkpoint: Checkpoint,
    windows_ST: Tensor,
    criteria: Sequence[Criterion],
    totals: Accumulation,
) -> ShardScorer:
    """Load the model, ready to score."""
    params = context.params
    job = Calibration.of(params, checkpointing=context.runtime.activation_checkpointing)
    return ShardScorer(
        checkpoint,
        getattr(torch, params.dtype),
        windows_ST,
        criteria,
        seed=params.seed,
        micro_batch_size=params.calibration.micro_batch_size,
        world=context.world,
        sharding=choose_sharding(context.runtime.sharding, job, checkpoint, context.world),
        structures=list(_scored_units(context, checkpoint)),
        activation_checkpointing=context.runtime.activation_checkpointing,
        curvature=totals.curvature,
        gradients=totals.gradients,
        student=_given_student(context, criteria),
    )


def _given_student(context: Context, criteria: Sequence[Criterion]) -> GivenStudent | None:
    """The student that an earlier pass chose, if a criterion needs one."""
    chosen_by = {criterion.student_of for criterion in criteria if criterion.student_of is not None}
    if not chosen_by:
        return None
    student = context.params.student
    assert student is not None, "planned without its settings"
    stored = load_file(context.input_path("student") / SCORES)
    (scores,) = (scores_of_layers(stored, name, NEURONS) for name in chosen_by)
    keeps = [student_keeps(scores_U, student.lacks) for scores_U in scores]
    return GivenStudent(keeps, (student.teacher_share, student.teacher_temperature))


def _score_layers(
    context: Context,
    checkpoint: Checkpoint,
    criteria: Sequence[Criterion],
    totals: Accumulation,
    windows_ST: Tensor,
) -> SavedLayers:
    """Save each layer's scores once they are finished, float64 [units], by their names in the artifact; collective.

    Those that an earlier attempt has saved are reused. Weights are read one layer at a time.
    """
    world = context.world
    saved = SavedLayers(context.work / "scores", range(checkpoint.num_layers))
    left = unfinished(range(checkpoint.num_layers), saved.done, world)

    def write(layer: _Layer) -> None:
        of_kinds = (_layer_scores(kind, it, criteria, totals) for kind, it in layer.kinds.items())
        saved.write(layer.number, {name: scores_U for scores in of_kinds for name, scores_U in scores.items()})

    turns = Turns(left, world, write)
    second_pass = _SecondPass(context, checkpoint, criteria, totals, windows_ST)
    try:
        for number in up_to_last(left):
            if number in left:
                turns.add(number, second_pass.layer(number, turns.owner(number)))
            else:
                second_pass.go_past(number)
            second_pass.after(number)
    except Interrupted:
        turns.finish()
        raise
    return saved


@dataclass(frozen=True)
class _Layer:
    """One layer, as criteria see its units of each kind."""

    number: int
    kinds: dict[str, ScoredLayer]


class _SecondPass:
    """The second pass of the windows through the model, layer by layer, for the criteria that need moments."""

    def __init__(
        self,
        context: Context,
        checkpoint: Checkpoint,
        criteria: Sequence[Criterion],
        totals: Accumulation,
        windows_ST: Tensor,
    ) -> None:
        self._context = context
        self._checkpoint = checkpoint
        self._units = _scored_units(context, checkpoint)
        self._totals = totals
        self._tokens = windows_ST.numel()
        self._needed = any(criterion.needs_moments for criterion in criteria)
        self._windows_ST = windows_ST
        self._stream: LayerStream | None = None
        self._layers: Iterator[tuple[int, nn.Module]] = iter(())

    def layer(self, number: int, owner: int) -> _Layer | None:
        """The next layer as criteria see it; None if another rank scores it. Collective."""
        grams = self._grams(number, owner) if self._needed else {}
        if owner != self._context.world.rank:
            return None
        kinds = {
            kind: scored_layer(
                self._checkpoint,
                units,
                number,
                self._context.params.seed,
                self._tokens,
                moments=self._moments(kind, number, grams[kind]) if grams else None,
                read_gradient=partial(self._mean_gradient, number) if self._totals.gradients else None,
            )
            for kind, units in self._units.items()
        }
        return _Layer(number, kinds)

    def go_past(self, number: int) -> None:
        """Take the windows through the next layer, whose scores are known already; collective."""
        if self._needed:
            stream = self._begun()
            stream.advance(self._next_layer())

    def after(self, number: int) -> None:
        """Report how far the pass has come, and end it if any rank was asked to."""
        if self._needed:
            self._context.progress.update("moments", number + 1, self._checkpoint.num_layers)
        self._context.interruption.stop_if_agreed(self._context.world)

    def _grams(self, number: int, owner: int) -> dict[str, Grams]:
        stream = self._begun()
        grams = stream.grams(number, self._next_layer(), list(self._units.values()), owner)
        return {kind: grams[units.kind][0] for kind, units in self._units.items()}

    def _moments(self, kind: str, number: int, grams: Grams) -> tuple[Tensor, Tensor]:
        return grams.whole(), self._totals.mean_curvature(kind, number, self._tokens)

    def _next_layer(self) -> nn.Module:
        return next(self._layers)[1]

    def _mean_gradient(self, number: int, name: str) -> Tensor:
        return self._totals.mean_gradient(name, number, len(self._windows_ST))

    def _begun(self) -> LayerStream:
        """The stream of windows, begun by the first call, which never comes if all scores are known. Collective."""
        if self._stream is None:
            params, context = self._context.params, self._context
            dtype, size = getattr(torch, params.dtype), params.calibration.micro_batch_size
            context.check_layers(self._checkpoint, self._windows_ST, params.dtype)
            self._stream = LayerStream(self._checkpoint, self._windows_ST, dtype, size, context.world)
            self._layers = self._stream.layers(range(self._checkpoint.num_layers))
        return self._stream


def _layer_scores(
    kind: str, layer: ScoredLayer, criteria: Sequence[Criterion], totals: Accumulation
) -> dict[str, Tensor]:
    scores = {}
    for criterion in criteria:
        if kind not in criterion.units:
            continue
        scores_U = totals.of_layer(kind, criterion, layer.number)
        if criterion.score is not None and layer.units:
            with explaining(layer.number):
                scores_U = criterion.score(scores_U, layer)
        if not scores_U.isfinite().all():
            raise UserError(
                f"importance: {criterion.name} of layer {layer.number} is NaN or infinite; "
                "check the checkpoint's weights"
            )
        scores[score_name(layer.number, criterion.name, kind)] = scores_U.clone()
    return scores
