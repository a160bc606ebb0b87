"""One rank of the calibration pass: runs a model over windows of text and adds up the sums that score units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.criterion import Criterion, losses_of
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.core.head import Batch
from hfprune_dist.core.linear_observer import SeenLinear
from hfprune_dist.core.observers import NonFiniteError, SeeOutputGradients, UnitOutputs
from hfprune_dist.core.portions import wide_product
from hfprune_dist.core.score_batch import ScoredModel, UnitSums, score_batch
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
from hfprune_dist.scoring.layer_sums import LayerSums
from hfprune_dist.scoring.placement import load_placed
from hfprune_dist.scoring.shard_sums import SumsOfShard
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class GivenStudent:
    """A student that is known before the pass, and the settings of its loss.

    Attributes:
        keeps: mask of the neurons that it has, bool [neurons] for each layer.
        teacher: weight of the teacher in the loss, and its temperature.
    """

    keeps: Sequence[Tensor]
    teacher: tuple[float, float]


class ShardScorer:
    """Scores windows on one rank, in step with the others.

    Args:
        windows_ST: int64 [windows, tokens], the same on every rank.
        criteria: the criteria that observe something.
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
        curvature: LayerSums | None = None,
        gradients: LayerSums | None = None,
        student: GivenStudent | None = None,
    ) -> None:
        family = checkpoint.family
        placed = load_placed(checkpoint, dtype, micro_batch_size, sharding, world)
        self.module = placed.module
        self.release = placed.release
        use_memory_efficient_backward(self.module, family)
        keep_no_gathered_weights(self.module)
        if activation_checkpointing:
            checkpoint_activations(self.module, family)
        body, head = family.body_of(self.module), family.head_of(self.module)
        self._experts = see_experts(self.module, family)
        self._model = ScoredModel(
            body=lambda input_ids_BT: body(input_ids=input_ids_BT, use_cache=False).last_hidden_state,
            head=placed.head,
            outputs={kind: self._outputs_of(checkpoint.structures[kind], criteria) for kind in structures},
            after=after_head(checkpoint),
            before_backward=placed.before_backward,
            student={NEURONS: [keeps_U.to(world.device) for keeps_U in student.keeps]} if student else {},
        )
        self._teacher = student.teacher if student else None
        require_known_logits(checkpoint, self.module, placed.head, windows_ST[0].to(world.device))
        self._units = [checkpoint.structures[kind] for kind in structures]
        self._vocabulary = head.out_features
        self._windows_ST = windows_ST
        self._criteria = criteria
        self._seed = seed
        self._world = world
        self._curvature = curvature
        self._gradients = gradients

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
        see, linears = self._adding_curvature(counts=counts), self._adding_gradients(counts=counts)
        sums = UnitSums(self._model.outputs, self._criteria, see, linears)
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

    def _adding_curvature(self, *, counts: bool) -> dict[str, SeeOutputGradients]:
        """For each kind, what adds g g^T of output gradients g; this rank's count only if it ``counts``."""
        sums = self._curvature

        def add(kind: str, layer: int, gradients_NC: Tensor) -> None:
            assert sums is not None
            sums.add(kind, layer, gram_matrix(gradients_NC) if counts else None)

        return {kind: partial(add, kind) for kind in (sums.sizes if sums else ())}

    def _adding_gradients(self, *, counts: bool) -> list[SeenLinear]:
        """For each weight that units own, what adds its gradient; this rank's counts only if it ``counts``."""
        sums = self._gradients

        def add(name: str, layer: int, inputs_BTI: Tensor, gradients_BTO: Tensor) -> None:
            assert sums is not None
            product = partial(wide_product, gradients_BTO.flatten(0, -2), inputs_BTI.flatten(0, -2))
            sums.add(name, layer, product() if counts else None)

        return [
            SeenLinear(self._linear(units, layer, name), partial(add, name, layer))
            for units in (self._units if sums else ())
            for name in units.weights
            for layer in range(units.num_layers)
        ]

    def _linear(self, units: Units, layer: int, weight: str) -> nn.Module:
        return self.module.get_submodule(units.tensor(layer, weight.removesuffix(".weight")))

    def _outputs_of(self, units: Units, criteria: Sequence[Criterion]) -> UnitOutputs:
        """Return the modules at which units are observed, and those that make their channels if a criterion asks."""
        if units.experts > 1:
            return UnitOutputs(self._experts, units.channels_per_unit, experts=units.experts)
        layers = range(units.num_layers)
        outputs = [self._linear(units, layer, units.output) if units.counts[layer] else None for layer in layers]
        makers = list(zip(units.weights[:-1], units.row_parts, strict=True))
        needed = any(it.observes == "weights" for it in criteria)
        rows = [[(self._linear(units, layer, name), parts) for name, parts in makers] for layer in layers if needed]
        return UnitOutputs(outputs, units.channels_per_unit, rows)
