"""Importance: score every unit over the calibration windows, on a model whole on each rank, or sharded over all.

Any number of criteria share the pass: one forward, one pass over the logits, one backward for each loss; a student's
loss adds a forward. Windows are cut into fixed shards, whatever the number of ranks; ranks work on consecutive shards,
and the shards' sums are added in shard order. So first-order sums have the same bits on any number of ranks with
as many threads each, and a resumed stage continues at a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.read_tensors import scored_layer
from hfprune_dist.checkpoints.tensor_files import is_usable
from hfprune_dist.core.criterion import Criterion, ScoredLayer, losses_of
from hfprune_dist.core.gram import mirrored
from hfprune_dist.core.observers import gram_name
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.data.windows import (
    WINDOWS,
    Sampling,
    load_windows,
    read_mixture,
    read_windows,
    save_windows,
)
from hfprune_dist.distributed.frozen_model import choose_sharding
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.sums import naming_layer, windows_held_out
from hfprune_dist.errors import UserError, naming
from hfprune_dist.kinds.importance import ImportanceParameters
from hfprune_dist.kinds.memory import Passes
from hfprune_dist.methods import CRITERIA
from hfprune_dist.methods.sdmprune import student_keeps
from hfprune_dist.scoring.accumulation import Accumulation
from hfprune_dist.scoring.shard_scorer import GivenStudent, ShardScorer, cut_into_shards, summed_matrices
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.score_names import SCORES, score_name, scores_of_layers

Context = AnyContext[ImportanceParameters]

# The sums so far, in the work folder.
PARTIAL = "partial.safetensors"
# How windows pass the model, there too.
PASSES = "passes.json"
# ``auto`` leaves at least so many shards, whatever the number of ranks, so that scores have the same bits.
LEAST_SHARDS = 8


def run(context: Context) -> None:
    """Write ``importance.safetensors`` and ``windows.safetensors``."""
    checkpoint, world = open_checkpoint(context.input_path("model")), context.world
    criteria = [CRITERIA[name] for name in context.params.criteria]
    world.on_rank0(lambda: _prepare_windows(context))
    windows_ST = load_windows(context.work)
    observing = [criterion for criterion in criteria if criterion.observes != "nothing"]
    passes = _passes(context, checkpoint, windows_ST)
    totals = _accumulate(context, checkpoint, windows_ST, observing, passes.at_once)
    scores = _score_layers(context, checkpoint, criteria, totals, windows_ST, passes)
    draft = context.open_draft()

    def write() -> None:
        with naming(draft / SCORES):
            save_file(scores, draft / SCORES)
        save_windows(windows_ST, draft)

    world.on_rank0(write)
    losses = [loss for loss in losses_of(criteria) if loss.in_nats]
    means = {f"mean_{loss.name}_nats": float(totals.sums[loss.name]) / len(windows_ST) for loss in losses}
    context.commit(draft, {"tokens": windows_ST.numel(), **means})


def _prepare_windows(context: Context) -> None:
    """Cut the windows into the work folder, unless an earlier attempt has."""
    if is_usable(context.work / WINDOWS):
        return
    settings = context.params.calibration
    sampling = Sampling(settings.samples, settings.sequence_length, context.params.seed, context.params.add_bos_token)
    tokenizer = load_tokenizer(context.input_path("model"))
    sources = [(each.text.model_dump(), context.input_if_any(each.role), each.windows) for each in settings.shares()]
    if settings.mixture is None:
        windows_ST = read_windows(*sources[0][:2], tokenizer, sampling, "calibration")
    else:
        apart = windows_held_out(settings.samples, settings.least_at_once)
        windows_ST = read_mixture(sources, tokenizer, sampling, apart, "calibration")
    save_windows(windows_ST, context.work)


# The pass.


def _passes(context: Context, checkpoint: Checkpoint, windows_ST: Tensor) -> Passes:
    """How windows pass the model: as many at once as in an earlier attempt, whose shards were cut by that."""
    settings, file = context.params.calibration, context.work / PASSES
    checkpointing = context.runtime.activation_checkpointing
    need = partial(context.params.passes_over, checkpoint, checkpointing=checkpointing)
    found = context.passes(need, settings.micro_batch_size, windows_ST, LEAST_SHARDS * settings.shard_size)

    def decided_first() -> Passes:
        earlier = read_json(file) if (context.work / PARTIAL).is_file() else None
        write_json(file, earlier or found)
        return Passes(*(earlier or found))

    decided = context.world.on_rank0(decided_first)
    context.decided["micro_batch_size"] = decided.at_once
    return decided


def _accumulate(
    context: Context, checkpoint: Checkpoint, windows_ST: Tensor, criteria: Sequence[Criterion], micro_batch_size: int
) -> Accumulation:
    """Add up all shards; if no criterion sums anything, there are none, and no model is loaded."""
    params, world = context.params, context.world
    settings, kinds = params.calibration, checkpoint.pruned_kinds(params.structures)
    shards = cut_into_shards(len(windows_ST) if criteria else 0, micro_batch_size, settings.shard_size)
    totals = Accumulation(len(shards), context.work / PARTIAL, world, summed_matrices(checkpoint, kinds, criteria))
    if not totals.is_complete:
        checkpointing = context.runtime.activation_checkpointing
        sizes = len(windows_ST), settings.sequence_length, micro_batch_size
        need = params.passes_over(checkpoint, *sizes, checkpointing=checkpointing)
        scorer = ShardScorer(
            checkpoint,
            getattr(torch, params.dtype),
            windows_ST,
            criteria,
            seed=params.seed,
            world=world,
            sharding=choose_sharding(context.runtime.sharding, need, world),
            structures=[units.kind for units in kinds],
            activation_checkpointing=checkpointing,
            totals=totals,
            student=_given_student(context, criteria),
        )

        def score(shard: int, counts: bool) -> Mapping[str, Tensor]:
            longest = len(shards[totals.next_shard])  # only the very last shard is shorter
            return scorer.score(shards[shard], longest, counts=counts)

        while not totals.is_complete:
            context.progress.update("calibration", totals.next_shard, len(shards))
            totals.add_round(score)
            _stop_if_agreed(context, totals)
        scorer.release()
    context.progress.update("calibration", len(shards), len(shards))
    return totals


def _stop_if_agreed(context: Context, totals: Accumulation) -> None:
    if context.interruption.agreed(context.world):
        totals.save()
        raise Interrupted


def _given_student(context: Context, criteria: Sequence[Criterion]) -> GivenStudent | None:
    """The student that an earlier pass chose, if a criterion needs one."""
    chosen_by = {criterion.student_by for criterion in criteria if criterion.student_by is not None}
    if not chosen_by:
        return None
    student = context.params.student
    assert student is not None, "planned without its settings"
    stored = load_file(context.input_path("student") / SCORES)
    (scores,) = (scores_of_layers(stored, name, NEURONS) for name in chosen_by)
    keeps = [student_keeps(scores_U, student.lacks) for scores_U in scores]
    return GivenStudent(keeps, (student.teacher_share, student.teacher_temperature))


# Scores from what was added up.


def _score_layers(
    context: Context,
    checkpoint: Checkpoint,
    criteria: Sequence[Criterion],
    totals: Accumulation,
    windows_ST: Tensor,
    passes: Passes,
) -> dict[str, Tensor]:
    """Scores of all layers, float64 [units], by their names in the artifact; ranks take turns at layers. Collective.

    Criteria that need moments see the windows a second time, layer by layer, if there was no room for all of them.
    """
    world, kinds = context.world, checkpoint.pruned_kinds(context.params.structures)
    windows, tokens, seed = len(windows_ST), windows_ST.numel(), context.params.seed

    def mean_of(number: int, terms: int, name: str) -> Tensor:
        return totals.matrix(name, number) / terms

    scores: dict[str, Tensor] = {}
    waiting: list[tuple[str, ScoredLayer]] = []
    has_gradients = any(criterion.observes == "weight_gradients" for criterion in criteria)
    layers: Iterable[tuple[int, nn.Module | None]] = enumerate([None] * checkpoint.num_layers)
    needs_moments = any(criterion.needs_moments for criterion in criteria)
    if needs_moments and gram_name(kinds[0].kind) not in totals.matrices:
        dtype = context.params.dtype
        context.check_layers(checkpoint, windows_ST, dtype)
        stream = LayerStream(checkpoint, windows_ST, getattr(torch, dtype), passes.at_once, world, stay=passes.stay)
        layers = stream.reader.layers(range(checkpoint.num_layers))
    for number, layer in layers:
        turn = number % world.size
        grams = {} if layer is None else stream.grams(number, layer, kinds, turn)
        del layer
        if turn == world.rank:
            gradients = partial(mean_of, number, windows) if has_gradients else None
            for units in kinds:
                kind, moments = units.kind, None
                if needs_moments:
                    gram_DD = grams[kind][0].whole() if grams else mirrored(totals.matrix(gram_name(kind), number))
                    moments = gram_DD / tokens, mirrored(mean_of(number, tokens, kind))
                made = scored_layer(checkpoint, units, number, seed, tokens, moments=moments, read_gradient=gradients)
                waiting.append((kind, made))
        del grams
        if turn == world.size - 1 or number == checkpoint.num_layers - 1:  # ranks score a layer each at the same time
            while waiting:
                kind, scored = waiting.pop()
                for criterion in criteria:
                    if kind in criterion.units:
                        name = score_name(scored.number, criterion.name, kind)
                        scores[name] = _score(name, scored, criterion, totals)
            world.barrier()
        context.progress.update("scores", number + 1, checkpoint.num_layers)
        _stop_if_agreed(context, totals)
    return {name: scores_U for share in world.all_gather(scores) for name, scores_U in share.items()}


def _score(name: str, layer: ScoredLayer, criterion: Criterion, totals: Accumulation) -> Tensor:
    scores_U = totals.sums.get(name, torch.zeros(0, dtype=torch.float64))
    if criterion.score is not None and layer.units:
        with naming_layer(layer.number):
            scores_U = criterion.score(scores_U, layer)
    if not scores_U.isfinite().all():
        raise UserError(
            f"importance: {criterion.name} of layer {layer.number} is NaN or infinite; check the checkpoint's weights"
        )
    return scores_U.clone()
