"""One rank of the calibration pass: runs a model over windows of text and adds up the sums that score units."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.criterion import Criterion
from hfprune_dist.core.gram import add_gram
from hfprune_dist.core.head import Batch
from hfprune_dist.core.linear_observer import SeenLinear
from hfprune_dist.core.memory_limits import OWN_TERMS_BYTES
from hfprune_dist.core.observers import NonFiniteError, SeenUnits, UnitSums, gram_name
from hfprune_dist.core.portions import wide_product
from hfprune_dist.core.score_batch import ScoredModel, score_batch
from hfprune_dist.distributed.frozen_model import DecidedSharding, FrozenModel
from hfprune_dist.distributed.layer_check import check_logits
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.models.experts import see_experts
from hfprune_dist.models.loading import after_head
from hfprune_dist.models.memory_efficient_backward import (
    checkpoint_activations,
    keep_no_gathered_weights,
    use_memory_efficient_backward,
)
from hfprune_dist.scoring.accumulation import Accumulation, Size, bytes_of
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.score_names import score_name
from hfprune_dist.structures.units import Units

# A shard: the numbers of the windows in each of its micro-batches.
Shard = Sequence[range]


def cut_into_shards(windows: int, micro_batch_size: int, shard_size: int) -> list[Shard]:
    """Split windows into micro-batches and these into shards; only the last micro-batch and shard may be smaller."""
    starts = range(0, windows, micro_batch_size)
    micro_batches = [range(start, min(start + micro_batch_size, windows)) for start in starts]
    return [micro_batches[start : start + shard_size] for start in range(0, len(micro_batches), shard_size)]


def summed_matrices(
    checkpoint: Checkpoint, kinds: Sequence[Units], criteria: Sequence[Criterion]
) -> dict[str, list[Size]]:
    """The matrices that criteria need sums of: name -> size in each layer.

    The sum of g g^T at the output projection's output has the name of a kind of units; gradients have weights' names.
    The sum of h h^T at its input (``gram_name``) is among them if all of them are small enough to be added up by each
    rank; otherwise it takes a pass of its own, layer by layer.
    """
    hidden_size, tensors, layers = checkpoint.config["hidden_size"], checkpoint.tensors, range(checkpoint.num_layers)
    sizes: dict[str, list[Size]] = {}
    if any(criterion.needs_moments for criterion in criteria):
        sizes |= {units.kind: [(hidden_size, hidden_size) for _ in layers] for units in kinds}
        channels = {units.kind: [count * units.channels_per_unit for count in units.counts] for units in kinds}
        inputs: dict[str, list[Size]] = {gram_name(kind): [(n, n) for n in row] for kind, row in channels.items()}
        if bytes_of(sizes | inputs) <= OWN_TERMS_BYTES:
            sizes |= inputs
    if any(criterion.observes == "weight_gradients" for criterion in criteria):
        weights = [(units, name) for units in kinds for name in units.weights]
        sizes |= {name: [tensors[units.tensor(layer, name)].shape for layer in layers] for units, name in weights}
    return sizes


class GivenStudent(NamedTuple):
    """A student that is known before the pass: for each layer the mask of the neurons that it has; and the teacher's
    weight in its loss, and temperature.
    """

    keeps: Sequence[Tensor]
    teacher: tuple[float, float]


class ShardScorer:
    """Scores windows on one rank, in step with the others.

    Args:
        windows_ST: int64, the same on every rank.
        criteria: those that observe something.
        structures: the kinds of units that are scored.
        totals: where ``summed_matrices`` are added up, if there are any.
        student: the student of criteria with a ``student_by``, chosen by an earlier pass.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        windows_ST: Tensor,
        criteria: Sequence[Criterion],
        *,
        seed: int,
        world: World,
        sharding: DecidedSharding = "replicate",
        structures: Sequence[str] = (NEURONS,),
        activation_checkpointing: bool = False,
        totals: Accumulation | None = None,
        student: GivenStudent | None = None,
    ) -> None:
        family = checkpoint.family
        frozen = FrozenModel(checkpoint, dtype, sharding, world, backward_of_body=True)
        self.module = frozen.module
        self.release = frozen.release
        use_memory_efficient_backward(self.module, family)
        keep_no_gathered_weights(self.module)
        if activation_checkpointing:
            checkpoint_activations(self.module, family)
        experts = see_experts(self.module, family)
        body, head = family.body_of(self.module), family.head_of(self.module)
        self._model = ScoredModel(
            body=lambda input_ids_BT: body(input_ids=input_ids_BT, use_cache=False).last_hidden_state,
            head=frozen.head,
            after=after_head(checkpoint),
            before_backward=frozen.before_backward,
            student={NEURONS: [keeps_U.to(world.device) for keeps_U in student.keeps]} if student else {},
        )
        check_logits(checkpoint, frozen, windows_ST[0])
        self._windows_ST = windows_ST.to(world.device)
        self._criteria = criteria
        self._world = world
        self._totals = totals
        self._kinds = [checkpoint.structures[kind] for kind in structures]
        self._seen_units = self._units(experts)
        teacher = student.teacher if student else None
        self._batch = partial(Batch, vocabulary=head.out_features, seed=seed, teacher=teacher)

    def score(self, micro_batches: Shard, forwards: int = 0, *, counts: bool = True) -> dict[str, Tensor]:
        """Return sums over the windows of some micro-batches: name -> float64 vector.

        There is one for each layer and kind of units and criterion, named as in an importance artifact; and one of a
        single number for each loss, named as the loss: the sum over windows of their mean loss per token.

        Args:
            forwards: number of micro-batches on the rank that has the most of them. Forwards and backwards of a sharded
                model are collective, so a rank with fewer first scores its first micro-batch once for each one that it
                lacks, and discards the results.
            counts: whether this shard is added to the matrices of all ranks.

        Raises:
            UserError: if activations or gradients of a layer are NaN or infinite.
        """
        if missing := max(0, forwards - len(micro_batches)):
            self.score([micro_batches[0]] * missing, counts=False)
        sums = UnitSums(
            self._seen_units,
            self._criteria,
            partial(self._add_gram, counts=counts),
            self._adding_gradients(counts=counts),
        )
        losses: dict[str, Tensor] = {}
        for windows in micro_batches:
            input_ids_BT = self._windows_ST[windows.start : windows.stop]
            try:
                values = score_batch(self._model, self._batch(input_ids_BT, windows), sums)
            except NonFiniteError as error:
                raise UserError(
                    f"importance, calibration windows from number {windows.start} on: {error}; set "
                    "importance.dtype=float32 if it isn't yet, else check the checkpoint's weights"
                ) from None
            for name, value in values.items():
                losses[name] = losses.get(name, 0.0) + torch.tensor([value], dtype=torch.float64)
        return {score_name(layer, name, kind): sum_N for (kind, layer, name), sum_N in sums.sums.items()} | losses

    def _add_gram(self, name: str, layer: int, vectors_ND: Tensor, *, counts: bool) -> None:
        """Add v v^T, if it is summed in this pass; this rank's counts only if it ``counts``."""
        if self._totals is not None and name in self._totals.matrices:
            self._totals.add_to_matrix(name, layer, partial(add_gram, vectors_ND=vectors_ND) if counts else None)

    def _add_gradient(
        self, weight: str, layer: int, inputs_BTI: Tensor, gradients_BTO: Tensor, *, counts: bool
    ) -> None:
        """Add a weight's gradient; this rank's counts only if it ``counts``."""
        assert self._totals is not None

        def add(sum_OI: Tensor) -> None:
            sum_OI += wide_product(gradients_BTO.flatten(0, -2), inputs_BTI.flatten(0, -2))

        self._totals.add_to_matrix(weight, layer, add if counts else None)

    def _adding_gradients(self, *, counts: bool) -> list[SeenLinear]:
        """What adds the gradient of each weight that units own, if a criterion needs them."""
        return [
            SeenLinear(self._linear(units, layer, name), partial(self._add_gradient, name, layer, counts=counts))
            for units in self._kinds
            for name in units.weights
            if self._totals is not None and name in self._totals.matrices
            for layer in range(units.num_layers)
        ]

    def _linear(self, units: Units, layer: int, weight: str) -> nn.Module:
        return self.module.get_submodule(units.tensor(layer, weight.removesuffix(".weight")))

    def _units(self, experts: Sequence[nn.Module | None]) -> list[SeenUnits]:
        """The units of all layers that have some, with the modules that make their channels if a criterion asks."""
        needs_rows = any(criterion.observes == "weights" for criterion in self._criteria)
        found = []
        for units in self._kinds:
            makers = list(zip(units.weights[:-1], units.row_parts, strict=True)) if needs_rows else []
            for layer in (layer for layer, count in enumerate(units.counts) if count):
                output = experts[layer] if units.experts > 1 else self._linear(units, layer, units.output)
                assert output is not None
                rows = [(self._linear(units, layer, name), parts) for name, parts in makers if units.experts == 1]
                found.append(SeenUnits(units.kind, layer, output, units.channels_per_unit, rows, units.experts))
        return found
