"""One rank of the calibration pass: runs a model over windows of text and adds up the sums that score units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.bound_losses import Batch, TeacherSettings
from hfprune_dist.core.criteria import Criterion, losses_of
from hfprune_dist.core.linear_observer import SeenLinear
from hfprune_dist.core.score_batch import ScoredModel, UnitSums, score_batch
from hfprune_dist.core.unit_outputs import InputProjection, UnitOutputs
from hfprune_dist.core.unit_sums import KindSums, NonFiniteError
from hfprune_dist.distributed.frozen_model import DecidedSharding
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.models.after_head import after_head, require_known_logits
from hfprune_dist.models.experts import see_experts
from hfprune_dist.models.memory_efficient_backward import (
    checkpoint_activations,
    keep_no_gathered_weights,
    use_memory_efficient_backward,
)
from hfprune_dist.scoring.curvature import Curvature
from hfprune_dist.scoring.placement import load_placed
from hfprune_dist.scoring.weight_gradients import WeightGradients
from hfprune_dist.structures import EXPERTS, NEURONS
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class SumsOfShard:
    """Sums over the micro-batches of one rank's shard.

    Attributes:
        kinds: kind of units -> its sums.
        losses: loss name -> sum over windows of the loss per token.
    """

    kinds: dict[str, KindSums]
    losses: dict[str, float]


@dataclass(frozen=True)
class GivenStudent:
    """A student that is known before the pass, and the settings of its loss.

    Attributes:
        keeps: mask of the neurons that it has, bool [neurons] for each layer.
    """

    keeps: Sequence[Tensor]
    teacher: TeacherSettings


class ShardScorer:
    """Scores windows on one rank, in step with the others.

    Args:
        windows_ST: int64 [windows, tokens], the same on every rank.
        criteria: the criteria that have something to sum.
        sharding: whether the model is whole on each rank, or sharded over all.
        structures: the kinds of units that are scored.
        curvature: sums of output gradients' second moments, if a criterion needs them.
        gradients: sums of weights' gradients, if a criterion needs them.
        student: the student of criteria with a ``student_of``, chosen by an earlier pass.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        windows_ST: Tensor,
        criteria: Sequence[Criterion],
        *,
        seed: int,
        micro_batch_size: int,
        world: World,
        sharding: DecidedSharding = "replicate",
        structures: Sequence[str] = (NEURONS,),
        activation_checkpointing: bool = False,
        curvature: Curvature | None = None,
        gradients: WeightGradients | None = None,
        student: GivenStudent | None = None,
    ) -> None:
        family = checkpoint.family
        placed = load_placed(checkpoint, dtype, micro_batch_size, sharding, world)
        self.module, self._release = placed.module, placed.release
        use_memory_efficient_backward(self.module, family)
        keep_no_gathered_weights(self.module)
        if activation_checkpointing:
            checkpoint_activations(self.module, family)
        body, head = family.body_of(self.module), family.head_of(self.module)
        self._experts = see_experts(self.module, family)
        needs_linears = any(it.needs_weight_products or it.needs_weight_gradients for it in criteria)
        self._linears = _linears_of(checkpoint, structures, self.module) if needs_linears else {}
        self._model = ScoredModel(
            body=lambda input_ids_BT: body(input_ids=input_ids_BT, use_cache=False).last_hidden_state,
            head=placed.head,
            outputs={kind: self._outputs_of(checkpoint.structures[kind], criteria) for kind in structures},
            after=after_head(checkpoint),
            rearming=placed.rearming,
            student={NEURONS: [keeps_U.to(world.device) for keeps_U in student.keeps]} if student else {},
        )
        self._teacher = student.teacher if student else None
        require_known_logits(checkpoint, self.module, placed.head, windows_ST[0].to(world.device))
        self._vocabulary = head.out_features
        self._windows_ST = windows_ST
        self._criteria = criteria
        self._seed = seed
        self._world = world
        self._curvature = curvature
        self._gradients = gradients

    def release(self) -> None:
        """Free the memory of the model's weights; nothing can be scored afterwards."""
        self._release()

    def score(self, micro_batches: Sequence[range], forwards: int = 0, *, counts: bool = True) -> SumsOfShard:
        """Return sums over the windows of some micro-batches.

        Args:
            forwards: number of micro-batches on the rank that has the most of them. Forwards and backwards of a sharded
                model are collective, so a rank with fewer first scores its first micro-batch once for each one that it
                lacks, and discards the results.
            counts: whether this shard is added to the curvature and the weights' gradients of all ranks.

        Raises:
            UserError: if activations or gradients of a layer are NaN or infinite.
        """
        missing = forwards - len(micro_batches)
        if missing > 0:
            self._score([micro_batches[0]] * missing, counts=False)
        return self._score(micro_batches, counts=counts)

    def _score(self, micro_batches: Sequence[range], *, counts: bool) -> SumsOfShard:
        see = self._curvature.seeing(counts=counts) if self._curvature else {}
        sums = UnitSums(self._model.outputs, self._criteria, see, self._seen_linears(counts=counts))
        losses = {loss.name: 0.0 for loss in losses_of(self._criteria)}
        for windows in micro_batches:
            input_ids_BT = self._windows_ST[windows.start : windows.stop].to(self._world.device)
            batch = Batch(input_ids_BT, windows, self._vocabulary, self._seed, self._teacher)
            try:
                for name, value in score_batch(self._model, batch, sums).items():
                    losses[name] += value
            except NonFiniteError as error:
                raise UserError(
                    f"importance, calibration windows from number {windows.start} on: {error}; set "
                    "importance.dtype=float32 if it isn't yet, else check the checkpoint's weights"
                ) from None
        return SumsOfShard(sums.kinds, losses)

    def _outputs_of(self, units: Units, criteria: Sequence[Criterion]) -> UnitOutputs:
        """Return the modules at which units are observed, with their input projections if a criterion needs these."""
        if units.experts > 1:
            whole = units.kind == EXPERTS
            return UnitOutputs(self._experts, units.channels_per_unit, experts=units.experts, are_experts=whole)
        outputs = [
            self.module.get_submodule(units.tensor(layer, units.output)) if count else None
            for layer, count in enumerate(units.counts)
        ]
        inputs = self._input_projections_of(units) if any(it.needs_weight_products for it in criteria) else ()
        return UnitOutputs(outputs, units.channels_per_unit, inputs, are_neurons=units.kind == NEURONS)

    def _input_projections_of(self, units: Units) -> list[tuple[InputProjection, ...]]:
        of_weights = [
            [InputProjection(module, parts) for module in self._linears[name]]
            for name, parts in zip(units.weights[:-1], units.row_parts, strict=True)
        ]
        return list(zip(*of_weights, strict=True))

    def _seen_linears(self, *, counts: bool) -> list[SeenLinear]:
        seeing = self._gradients.seeing(counts=counts) if self._gradients else {}
        return [
            SeenLinear(module, see)
            for name, of_layers in seeing.items()
            for module, see in zip(self._linears[name], of_layers, strict=True)
        ]


def _linears_of(checkpoint: Checkpoint, structures: Sequence[str], model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return name within a layer of each weight that units own -> the linear modules with this weight, by layer."""
    return {
        name: [model.get_submodule(units.tensor(it, name.removesuffix(".weight"))) for it in range(units.num_layers)]
        for units in (checkpoint.structures[kind] for kind in structures)
        for name in units.weights
    }
