"""Types of a method's settings, shared by what overrides them and by the parameters of stages."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar, get_args

from pydantic import AfterValidator

from hfprune_dist.structures import EXPERTS, NEURONS, TOGETHER, Kind, Structure

Allocation = Literal["uniform", "plain", "local", "global", "standardized", "searched", "low_rank"]
Refit = Literal["none", "bias", "dense", "layerwise", "block"]
Effort = Literal["quick", "thorough"]

StructureT = TypeVar("StructureT", Kind, Structure)


def _in_order(structures: list[StructureT]) -> list[StructureT]:
    if NEURONS not in structures and EXPERTS not in structures:
        beside = ", ".join(TOGETHER[1:])
        raise ValueError(f"{NEURONS} must be among them; beside it there may be {beside}; or {EXPERTS}, alone")
    if len(set(structures)) < len(structures):
        raise ValueError(f"{', '.join(structures)}: name each once")
    return [kind for kind in get_args(Structure) if kind in structures]


def _goes_together(structures: list[Structure]) -> list[Structure]:
    if EXPERTS in structures and len(structures) > 1:
        raise ValueError(f"{', '.join(structures)}: {EXPERTS} go alone; leave them out, or all else")
    return structures


# What is pruned, in a fixed order whatever order it is given in; and what is scored, possibly for several methods.
Structures = Annotated[list[Structure], AfterValidator(_in_order), AfterValidator(_goes_together)]
Kinds = Annotated[list[Kind], AfterValidator(_in_order)]
