"""Sums of micro-batches of a tiny model, as the calibration pass computes them on one rank."""

import contextlib
import copy
from collections import defaultdict
from typing import NamedTuple

import torch
from tiny import FAMILY
from unit_outputs import seen_units

from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.core.head import Batch
from hfprune_dist.core.observers import UnitSums, gram_name
from hfprune_dist.core.score_batch import ScoredModel, score_batch
from hfprune_dist.methods import CRITERIA
from hfprune_dist.models.memory_efficient_backward import (
    checkpoint_activations,
    keep_no_gathered_weights,
    use_memory_efficient_backward,
)

NEURONS, GROUPS = "neurons", "kv_groups"
BOTH = (NEURONS, GROUPS)
TEACHING = (0.4, 0.2)


class Sums(NamedTuple):
    """Criterion -> sums [layers, units]; layer -> the sum of g g^T at its output projection's output, of h h^T at its
    input.
    """

    of_units: dict
    curvature: dict
    grams: dict


def checkpointed(model, family):
    use_memory_efficient_backward(model, family)
    keep_no_gathered_weights(model)
    checkpoint_activations(model, family)


def some_windows(count=5, tokens=24):
    return torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(1))


def units_of(model, kinds):
    structures = FAMILY.structures(model.config.to_dict())
    return seen_units(model, [structures[kind] for kind in kinds])


def a_student(model):
    """Return a student without every tenth neuron, different ones in each layer."""
    numbers = torch.arange(model.config.intermediate_size)
    return torch.stack([(numbers + layer) % 10 != 0 for layer in range(model.config.num_hidden_layers)])


def sums_of(
    model,
    windows,
    names,
    at_once=1,
    *,
    seed=0,
    prepare=use_memory_efficient_backward,
    kinds=(NEURONS,),
    teaching=TEACHING,
    linears=lambda _model: [],
):
    """Return kind -> ``Sums``; the model stays as it is."""
    model, family = copy.deepcopy(model).requires_grad_(False), FAMILY
    prepare(model, family)
    head = family.head_of(model)
    scored = ScoredModel(
        body=lambda input_ids: family.body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state,
        head=lambda: contextlib.nullcontext((head.weight, head.bias)),
        student={NEURONS: list(a_student(model))},
    )
    grams = defaultdict(lambda: defaultdict(float))

    def add(name, layer, vectors):
        grams[name][layer] += gram_matrix(vectors.float())

    criteria = [CRITERIA[name] for name in names]
    sums = UnitSums(units_of(model, kinds), criteria, add, linears(model))
    for start in range(0, len(windows), at_once):
        input_ids = windows[start : start + at_once]
        numbers = range(start, start + len(input_ids))
        score_batch(scored, Batch(input_ids, numbers, head.out_features, seed, teaching), sums)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return {kind: Sums(stacked(sums, kind), grams[kind], grams[gram_name(kind)]) for kind in kinds}


def stacked(sums, kind):
    """Return criterion -> sums of a kind of units [layers, units]."""
    layers = defaultdict(dict)
    for (of_kind, layer, name), sum_N in sums.sums.items():
        layers[name] |= {layer: sum_N} if of_kind == kind else {}
    return {name: torch.stack([scores[layer] for layer in sorted(scores)]) for name, scores in layers.items() if scores}


def assert_same_bits(sums, expected):
    for one, other in zip(sums, expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], values) for key, values in other.items())
