"""Type checks for the values of a config.json, so that a message can name the key of a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfprune_dist.checkpoints.layer_settings import ATTENTION_LAYER_LISTS, LISTS, OF_THE_FIRST, PERIODS
from hfprune_dist.checkpoints.refusals import Refusals
from hfprune_dist.checkpoints.text_decoder import DEEPSTACK
from hfprune_dist.structures.experts import (
    ALL_WIDTHS,
    LAYERS_WITHOUT,
    PLACES,
    SHARED_NUMBERS,
    SHARED_WIDTHS,
    number_of_experts,
)

# The type or types for ``isinstance``, and their description for messages.
Kind = tuple[type | tuple[type, ...], str]
# Lists of layers' numbers.
_OF_NUMBERS = (*ATTENTION_LAYER_LISTS, LAYERS_WITHOUT, DEEPSTACK)


def check_types(config: Mapping[str, Any], where: str) -> None:
    """Check a config.json's values, after ``checks.check_config`` has checked its sizes; null counts as absent.

    Raises:
        UserError: naming the key, its value and what it must be.
    """
    refusals = Refusals(config, where)
    for key, (kind, valid) in _kinds(config).items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise refusals.invalid(key, value, valid)
    for key in ALL_WIDTHS if number_of_experts(config) else ():
        if config.get(key) is not None and config[key] < 1:
            raise refusals.invalid(key, config[key], "a positive integer")
    for key in _OF_NUMBERS:
        if not all(isinstance(number, int) for number in config.get(key) or ()):
            raise refusals.invalid(key, config[key], "a list of integers")
    layers = config["num_hidden_layers"]
    for key in (it for it in LISTS if config.get(it)):
        if not isinstance(config[key], list) or len(config[key]) < layers:
            raise refusals.invalid(key, config[key], f"a list with an entry for each of {layers} layers")


def _kinds(config: Mapping[str, Any]) -> dict[str, Kind]:
    """Key -> the type of its value; some keys matter only in mixtures of experts."""
    integers = (*OF_THE_FIRST, *PLACES, *PERIODS, *PERIODS.values())
    if number_of_experts(config):
        integers = (*integers, *ALL_WIDTHS, *SHARED_WIDTHS, *SHARED_NUMBERS)
    lists = (*_OF_NUMBERS, "architectures")
    kinds: dict[str, Kind] = {"residual_multiplier": ((int, float), "a number"), "auto_map": (dict, "an object")}
    return kinds | dict.fromkeys(integers, (int, "an integer")) | dict.fromkeys(lists, (list, "a list"))
