"""Checks that refuse a configuration, before any stage is planned or once all are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import EfficiencyConfig, SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.plan import NONE, Cell, label_of


def check_recovery(config: SweepConfig, methods: Mapping[str, Method]) -> None:
    """Refuse methods that prune during recovery if there is no recovery.

    Raises:
        UserError: naming them.
    """
    named = [name for name, method in methods.items() if method.prunes_in == "recovery"]
    if named and config.recovery.method == NONE:
        raise UserError(
            f"--methods {', '.join(named)}: units go while LoRA recovers the model (prunes_in: recovery), and "
            "recovery.method is none; set it to lora, or leave the method out"
        )


def check_positions(efficiency: EfficiencyConfig, model: ModelSource) -> None:
    """Refuse generations that are longer than the number of a model's positions."""
    longest, positions = max(efficiency.prompt_tokens) + efficiency.new_tokens, model.checkpoint.max_positions
    if efficiency.enabled and positions is not None and longest > positions:
        raise UserError(
            f"efficiency: the longest of prompt_tokens and new_tokens are {longest} together, more than the "
            f"{positions} positions of model {model.name!r} (max_position_embeddings); choose fewer"
        )


def place_of(model: str, method: str) -> str:
    """Name a model and a method, for messages."""
    return f"model {model!r}, method {method!r}"


def refuse_same_rows(cells: Iterable[Cell]) -> None:
    """Refuse rows that differ in nothing but their names.

    Raises:
        UserError: naming two of them.
    """
    labels: dict[str, str] = {}
    for cell in cells:
        label = label_of(cell.model, cell.ratio, cell.method, cell.recovery)
        if cell.evaluate in labels:
            raise UserError(
                f"rows {labels[cell.evaluate]!r} and {label!r} would be the same: their models have the same "
                "content, and their methods do the same at this ratio; leave one of them out"
            )
        labels[cell.evaluate] = label
