"""Floating-point operations of prune stages that measure shapes, which the stages' manifests name.

Usual values are assumed for what is not recorded. Shapes that differ from layer to layer count with the outcome's
sizes, as if no two were alike and none had been measured before. Of the layers that were tried again on the way to an
order, only those that went are known. An order counts in every stage that needs it, even if stages shared one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hfprune_dist.config.parameters import PruneParameters
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.layer_pass_work import (
    RIDGES,
    WindowCounts,
    channels_of,
    dense_refit,
    forward,
    forward_of_all,
    gram,
    least_squares_for,
    sequential_refit,
)
from hfprune_dist.planning.model_shape import ModelShape
from hfprune_dist.planning.operations import NO_OPERATIONS, Operations
from hfprune_dist.planning.plain_shapes import PlainShape
from hfprune_dist.structures import KV_GROUPS, LAYERS, NEURONS

# stages.cheap_measurement: windows on which candidates are compared, fewer for an order of layers; one in EVERY tokens.
WINDOWS, WINDOWS_OF_ORDER, EVERY = 8, 2, 2
# stages.finals: one of this many micro-batches is kept apart; shapes in the first comparison of refitted models, to
# which a plain search adds the shape that only prunes MLPs.
JUDGED_EVERY, FINALISTS = 16, 2
# core.drop_order: layers that are measured again; core.width_search: number of times a search measures.
CONTENDERS, MEASUREMENTS = 5, 3

LAYERS_ALONE = re.compile(r"(\d+) layers")

# What a candidate makes of a layer, and a number to distinguish choices of unknown sizes; None: the layer goes.
Choice = tuple[Dimensions, int] | None
Candidate = Sequence[Choice]


@dataclass(frozen=True)
class Search:
    """A prune stage that measured shapes.

    Attributes:
        model: the model that is pruned, which differs from ``dense`` after the first round.
        kept: the outcome.
        metrics: the stage's metrics.
    """

    params: PruneParameters
    model: ModelShape
    dense: ModelShape
    kept: ModelShape
    windows: WindowCounts
    metrics: Mapping[str, Any]

    def operations(self) -> Operations:
        """Operations of everything before the refit of the result.

        Raises:
            ValueError: if the metrics are another version's.
        """
        windows = self._seen if self._has_finals else self.windows
        dense = self._compared(windows, WINDOWS) * forward_of_all(self.dense, windows.length)
        compared = self._grid() if self._is_plain else self._searched(windows)
        return Operations(dense) + self._order(windows) + compared + self._finals()

    @property
    def _is_plain(self) -> bool:
        return self.params.allocation == "plain"

    @property
    def _has_finals(self) -> bool:
        return self._is_plain or LAYERS in self.params.structures

    @property
    def _kv_groups(self) -> bool:
        return KV_GROUPS in self.params.structures

    @property
    def _every(self) -> int:
        return 1 if self.params.structures == [NEURONS] else EVERY

    @property
    def _dropped(self) -> list[int]:
        return layers_in_order(self.metrics, self.model, self.dense)

    # Windows.

    @property
    def _judged(self) -> WindowCounts:
        """The windows that are kept apart if there may be finals."""
        return replace(self.windows, count=self.windows.count - self._seen.count or self.windows.count)

    @property
    def _seen(self) -> WindowCounts:
        """The other windows; a single micro-batch is both."""
        if self.windows.batches == 1:
            return self.windows
        judged = max(1, self.windows.batches // JUDGED_EVERY)
        return replace(self.windows, count=(self.windows.batches - judged) * self.windows.micro_batch)

    def _compared(self, windows: WindowCounts, most: int) -> int:
        """Number of tokens on which candidates are compared."""
        batches = max(1, most // windows.micro_batch)
        count = min(batches * windows.micro_batch, windows.held_out // windows.length)
        return windows.length * (count if self.params.structures == [NEURONS] else min(count, most))

    # Measurements.

    def _order(self, windows: WindowCounts) -> Operations:
        tokens, dropped = self._compared(windows, WINDOWS_OF_ORDER), self._dropped
        flops = NO_OPERATIONS
        for rank in range(len(dropped)):
            later = [it for it in (*dropped[rank:], *range(len(self.model.layers))) if it not in dropped[:rank]]
            contenders = list(dict.fromkeys(later))[: CONTENDERS if rank else None]
            candidates = [self._without([*dropped[:rank], layer]) for layer in contenders]
            flops += self._measured(candidates, tokens, self._every, None, checked=rank > 0)
        return flops

    def _grid(self) -> Operations:
        windows = self._seen
        candidates = [self._plain(name) for name in self.metrics.get("search_kl", {})]
        fitted = windows if self.params.refit != "none" else None
        return self._measured(candidates, self._compared(windows, WINDOWS), self._every, fitted)

    def layers_refitted(self) -> int:
        """The most layers that stay in any refitted shape but the outcome; those that stay in others are among them.

        Raises:
            ValueError: if the metrics are another version's.
        """
        return max((sum(it is not None for it in candidate) for candidate in self._finalists()), default=0)

    def _finalists(self) -> list[Candidate]:
        """The shapes that were compared once they were refitted."""
        return [self._named(name, number) for number, name in enumerate(self.metrics.get("finalists_kl", {}), 1)]

    def _finals(self) -> Operations:
        finalists = self._finalists()
        if not finalists:
            return NO_OPERATIONS
        first = FINALISTS + self._is_plain
        rounds = [finalists[:first], *([it] for it in finalists[first:])]
        dense = Operations(self._judged.tokens * forward_of_all(self.dense, self._judged.length))
        compared = (self._measured(it, self._judged.tokens, 1, None) for it in rounds)
        return sum((*compared, *(self._refitted(it) for it in finalists)), dense)

    def _refitted(self, candidate: Candidate) -> Operations:
        kept = ModelShape(tuple(choice[0] for choice in candidate if choice is not None))
        if self.params.refit != "dense":
            other_norms = self.params.mlp_targets is not None
            return sequential_refit(self.dense, kept, self._seen, kv_groups=self._kv_groups, other_norms=other_norms)
        dropped = [number for number, choice in enumerate(candidate) if choice is None]
        return dense_refit(self.model, kept, self._seen, kv_groups=self._kv_groups, dropped=dropped)

    def _searched(self, windows: WindowCounts) -> Operations:
        candidates = [self._named(name, number) for number, name in enumerate(self.metrics.get("search_kl", {}), 1)]
        tokens = self._compared(windows, WINDOWS)
        fitted = windows if self.params.refit != "none" else None
        again = MEASUREMENTS - 1 + any(LAYERS_ALONE.fullmatch(name) for name in self.metrics.get("search_kl", {}))
        flops = self._measured(candidates, tokens, self._every, fitted)
        return flops + self._measured([], tokens, self._every, fitted, checked=True) * again

    def _measured(
        self,
        candidates: Sequence[Candidate],
        tokens: int,
        every: int,
        fitted: WindowCounts | None,
        *,
        checked: bool = False,
    ) -> Operations:
        """One pass of all candidates layer by layer, with their logits and the dense model's.

        Args:
            tokens: number of tokens compared, of which one in ``every`` goes through the head.
            fitted: windows that a cheap refit sees; None without one: then one more micro-batch checks the layers.
            checked: whether layers were checked before, so that no such micro-batch is needed.
        """
        length, outputs = self.windows.length, self.model.hidden_size
        along = self.windows.micro_batch * length * (not checked) if fitted is None else fitted.tokens
        models = 1 + len(set(map(tuple, candidates)))
        flops = Operations(tokens / every * models * 2 * outputs * self.model.layers[0].vocabulary)
        alike = [0] * len(candidates)  # candidates that are the same up to a layer share a number and one run
        for number, dims in enumerate(self.model.layers):
            there: dict[tuple[int, Choice], int] = {}
            pairs = zip(alike, candidates, strict=True)
            alike = [there.setdefault((before, it[number]), len(there)) for before, it in pairs]
            own = sum(tokens * forward(choice[0], length) for _, choice in there if choice is not None)
            flops += Operations(own + along * forward(dims, length))
            if fitted is not None:
                choices = {choice for it in candidates if (choice := it[number]) is not None}
                grams = sum(gram(size) for size in channels_of(dims, self._kv_groups))
                flops += Operations(float32=along * grams) + _cheap_fits(dims, choices, self._kv_groups)
        return flops

    # Candidates.

    def _without(self, gone: Sequence[int]) -> Candidate:
        return [None if number in gone else (dims, 0) for number, dims in enumerate(self.model.layers)]

    def _plain(self, name: str) -> Candidate:
        shape = PlainShape.named(name)
        gone = self._dropped[: len(self.model.layers) - shape.num_layers]
        return [None if number in gone else (_smaller(dims, shape), 0) for number, dims in enumerate(self.model.layers)]

    def _named(self, name: str, number: int) -> Candidate:
        """The candidate that metrics call ``name``; if its sizes aren't recorded, about those of the outcome."""
        if self._is_plain:
            return self._plain(name)
        alone = LAYERS_ALONE.fullmatch(name)
        layers = int(alone.group(1)) if alone else len(self.kept.layers)
        gone = self._dropped[: len(self.model.layers) - layers]
        like = self.kept.layers[len(self.kept.layers) // 2]
        return [None if it in gone else (like, number) for it in range(len(self.model.layers))]


def layers_in_order(metrics: Mapping[str, Any], model: ModelShape, dense: ModelShape) -> list[int]:
    """The layers of the model that is pruned, in the order in which they would go.

    Metrics use the dense model's indices. A model that has lost layers renumbers the others; its last layers are
    assumed to go.
    """
    order, layers = list(metrics.get("layers_in_order_of_dropping") or []), len(model.layers)
    return order if layers == len(dense.layers) else [*range(layers)][layers - len(order) :][::-1]


def _smaller(dims: Dimensions, shape: PlainShape) -> Dimensions:
    heads = shape.kv_groups * (dims.num_heads // dims.num_key_value_heads)
    return replace(dims, num_key_value_heads=shape.kv_groups, num_heads=heads, intermediate_size=shape.width)


def _cheap_fits(dims: Dimensions, choices: set[tuple[Dimensions, int]], kv_groups: bool) -> Operations:
    """Least squares on one layer's output projections for every number of units, all with the same ridge."""
    flops = NO_OPERATIONS
    for place, channels in enumerate(channels_of(dims, kv_groups)):
        sizes = {(channels_of(choice, kv_groups)[place], number) for choice, number in choices}
        kept = [size for size, _ in sorted(sizes) if size < channels]
        if kept:
            tried = least_squares_for(dims.hidden_size, channels, kept[0], problems=2, ridges=RIDGES, errors=RIDGES)
            each = [least_squares_for(dims.hidden_size, channels, it, problems=0, ridges=1, errors=0) for it in kept]
            flops += sum((it.shared() for it in each), tried)
    return flops
