"""Conversion between a ratio of parameters and widths, the numbers of units that layers keep.

A ratio is removed parameters / all parameters of the model, as in the paper; it is not the share of units removed (20 %
of Llama-3.2-1B is 31 % of its neurons).
"""

from __future__ import annotations

from hfprune_dist.errors import UserError


class OutOfReachError(UserError):
    """No shape comes to a ratio, as nothing more is left that may be removed.

    Attributes:
        largest: the largest ratio that can be reached, as the message has it.
    """

    def __init__(self, message: str, largest: float) -> None:
        super().__init__(message)
        self.largest = round_down(largest)


def protected_layers(num_layers: int, protect_first: int, protect_last: int) -> set[int]:
    """Indices of the layers that lose nothing: all of them if more are to be protected than there are."""
    layers = range(num_layers)
    return {*layers[:protect_first], *layers[max(num_layers - protect_last, 0) :]}


def closest_multiple(exact: float, width: int, multiple_of: int) -> int:
    """The number of units closest to ``exact`` that a layer may keep: all ``width`` of them, or fewer in a multiple."""
    multiple = max(multiple_of, round(exact / multiple_of) * multiple_of)
    return min((min(multiple, width), width), key=lambda kept: abs(kept - exact))


def rounding(multiple_of: int, tensor_parallel: int = 1) -> str:
    """The settings that units are rounded by, for messages: in parentheses after a space; empty if they are all 1."""
    settings = {"multiple_of": multiple_of, "tensor_parallel": tensor_parallel}
    told = [f"{name} {number}" for name, number in settings.items() if number > 1]
    return f" ({', '.join(told)})" if told else ""


def to_multiples_of(step: int) -> str:
    """The same after a verb: to multiples of 64; empty for 1."""
    return f" to multiples of {step}" if step > 1 else ""


def or_a_smaller(multiple_of: int, tensor_parallel: int = 1) -> str:
    """The end of a sentence that advises another ratio; empty if no smaller multiple is divisible by
    ``tensor_parallel``.
    """
    return " or a smaller prune.multiple_of" if multiple_of > tensor_parallel else ""


def round_down(ratio: float) -> float:
    """A ratio with the four decimals that messages have, rounded down so that it can be reached."""
    return int(ratio * 10000) / 10000
