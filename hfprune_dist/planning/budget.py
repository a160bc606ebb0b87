"""Budget of parameters to remove where units of all kinds and whole layers compete, and the bounds on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfprune_dist.planning.plain_shapes import step_of_layers
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.widths import protected_layers
from hfprune_dist.structures import KV_GROUPS, NEURONS
from hfprune_dist.structures.kept import Shape

# The least share of its neurons that a layer keeps, and how many of the first and last layers lose nothing.
Limits = tuple[float, int, int]


@dataclass(frozen=True)
class Budget:
    """How many parameters to remove, and within which bounds; any shape that meets both will do.

    Attributes:
        parameters: to remove from the whole model.
        least: kind -> the fewest units that each layer keeps, if the layer itself stays. Numbers of KV groups are
            divisible by ``tensor_parallel``.
        droppable: indices of the layers that may be removed, ascending.
        fewest_layers: the fewest layers that must stay.
    """

    parameters: int
    least: Mapping[str, tuple[int, ...]]
    droppable: tuple[int, ...]
    fewest_layers: int

    def most_layers_gone(self, of_layers: Sequence[int]) -> int:
        """How many layers may go: as many as bounds allow, or the first number tried whose layers exceed the budget.

        Args:
            of_layers: parameters of each layer.
        """
        most = min(len(self.droppable), len(of_layers) - self.fewest_layers)
        smallest_first = sorted(of_layers[layer] for layer in self.droppable)
        tried = range(0, most, step_of_layers(len(of_layers)))
        return next((gone for gone in tried if sum(smallest_first[:gone]) > self.parameters), most)


def budget_of(target: ShapeTarget, limits: Limits) -> Budget:
    """The budget that a ratio asks for.

    Raises:
        UserError: if the bounds don't allow that much to be removed, or allow only more, where a layer has more than
            all units that may go; if rounding leaves nothing to remove; or if ``tensor_parallel`` doesn't divide the
            number of KV groups.
    """
    budget, largest = _bounded(target, limits), largest_ratio(target, limits)
    floors = " with the floors that prune.floor, protect_first and protect_last set"
    if target.ratio > largest:
        raise target.out_of_reach(largest, floors, lambda it: largest_ratio(it, limits))
    multiple_of, per_neuron = target.multiple_of, target.counts.units[NEURONS]
    fewest = min(count - (count - 1) // multiple_of * multiple_of for count in target.neurons.counts)
    if 2 * budget.parameters < fewest * per_neuron:
        raise target.removes_nothing()
    larger = _next_larger(target, budget, min(multiple_of, target.neurons.most) * per_neuron)
    if larger is not None:
        raise target.comes_to_none(larger / target.counts.total, floors)
    return budget


def largest_ratio(target: ShapeTarget, limits: Limits) -> float:
    """The ratio at which everything that may be removed is gone, whatever ratio is asked for."""
    budget, num_layers = _bounded(target, limits), target.checkpoint.num_layers
    # Measurements decide which layers go. Where layers differ, count on those whose removal leaves the most behind.
    smallest_first = sorted(budget.droppable, key=lambda layer: _at_least(target, budget, layer))
    gone = smallest_first[: num_layers - budget.fewest_layers]
    layers = tuple(layer for layer in range(num_layers) if layer not in gone)
    least = {kind: tuple(counts[layer] for layer in layers) for kind, counts in budget.least.items()}
    return target.counts.ratio(Shape(layers, least))


def _next_larger(target: ShapeTarget, budget: Budget, step: int) -> int | None:
    """Parameters of the layers that go in the next larger shape, if no shape meets the budget; None if one does.

    None does if shapes with many layers remove less than the budget even without all units that may go, and shapes with
    fewer layers remove more by their layers alone. Up to half a step of widths more is close enough, and up to a
    millionth of the model, as messages round ratios.

    Where layers differ, measurements may still choose layers with which the budget can't be met.
    """
    counts, num_layers = target.counts, target.checkpoint.num_layers
    at_least = [_at_least(target, budget, layer) for layer in range(num_layers)]
    units = sum(counts.layers) - sum(at_least)
    layers, remainders = (sorted(it[layer] for layer in budget.droppable) for it in (counts.layers, at_least))
    most_gone = min(len(layers), num_layers - budget.fewest_layers)
    tried = {*range(0, most_gone + 1, step_of_layers(num_layers)), most_gone}
    least_gone = {gone: sum(layers[:gone]) for gone in tried}
    slack = max(step / 2, counts.total / 1e6)
    too_many = [gone for gone, least in least_gone.items() if least - budget.parameters > slack]
    if any(units + sum(remainders[-gone:] if gone else []) >= budget.parameters for gone in tried.difference(too_many)):
        return None
    return min(least_gone[gone] for gone in too_many)


def _at_least(target: ShapeTarget, budget: Budget, layer: int) -> int:
    """Parameters of a layer that has lost every unit it may lose."""
    counts, structures = target.counts, target.checkpoint.structures
    gone = sum(counts.units[kind] * (structures[kind].counts[layer] - it[layer]) for kind, it in budget.least.items())
    return counts.layers[layer] - gone


def _bounded(target: ShapeTarget, limits: Limits) -> Budget:
    floor, first, last = limits
    num_layers, groups = target.checkpoint.num_layers, target.groups.counts
    goes = KV_GROUPS in target.structures
    if goes and target.divisor % target.tensor_parallel:
        raise target.unusable_split(target.divisor)
    protected = protected_layers(num_layers, first, last)
    # Of neurons alone, a whole number goes.
    smallest = target.counts.units[NEURONS] if target.structures == (NEURONS,) else 1
    return Budget(
        parameters=round(target.ratio * target.counts.total / smallest) * smallest,
        least={
            NEURONS: tuple(
                count if layer in protected else min(_at_least_of(floor, count, target.multiple_of), count)
                for layer, count in enumerate(target.neurons.counts)
            ),
            KV_GROUPS: tuple(
                target.tensor_parallel if goes and layer not in protected else count
                for layer, count in enumerate(groups)
            ),
        },
        droppable=tuple(layer for layer in range(num_layers) if layer not in protected | target.undroppable),
        fewest_layers=target.fewest_layers,
    )


def _at_least_of(floor: float, count: int, multiple_of: int) -> int:
    """A floor in neurons, rounded up to a multiple."""
    return -(-max(1, round(floor * count)) // multiple_of) * multiple_of
