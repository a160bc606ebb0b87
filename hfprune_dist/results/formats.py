"""Formats of numbers in tables; unknown values are shown as "-"."""

from __future__ import annotations

from collections.abc import Callable, Mapping

_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "P": 10**15, "E": 10**18, "Z": 10**21}
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def number(value: float | None, form: str) -> str:
    """A number in one of Python's formats; "-" if it isn't known."""
    return "-" if value is None else format(value, form)


def with_error(value: float | None, error: float | None, form: Callable[[float | None], str]) -> str:
    """A value and its error, if that is known."""
    return form(value) if value is None or error is None else f"{form(value)}±{form(error)}"


def counted(amount: int, noun: str) -> str:
    """A number with its noun, whose plural ends in s."""
    return f"{amount} {noun}{'s' * (amount != 1)}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:z.1f}"


def count(value: float | None) -> str:
    """A number of parameters, tokens or operations, in four digits."""
    if value is None:
        return "-"
    amount, unit = _scaled(value, _COUNTS, 999.95)
    return f"{amount:.4g}{unit}"


def rough(value: float | None) -> str:
    """A number of anything, in two digits."""
    return count(None if value is None else float(f"{value:.2g}"))


def byte_count(value: float | None) -> str:
    """Bytes, in units of powers of ten, in two or three digits."""
    return "-" if value is None else _short(value, _BYTES, 999.5)


def duration(seconds: float | None) -> str:
    """Seconds, minutes, hours or days in two digits."""
    return "-" if seconds is None else _short(seconds, _SECONDS, 99.5)


def _short(value: float, units: Mapping[str, int], limit: float) -> str:
    amount, unit = _scaled(value, units, limit)
    return f"{amount:.{0 if units[unit] == 1 or amount >= 9.95 else 1}f}{unit}"


def _scaled(value: float, units: Mapping[str, int], limit: float) -> tuple[float, str]:
    """A value in the first unit in which it is below ``limit``, and that unit."""
    unit = next((unit for unit, size in units.items() if value < limit * size), [*units][-1])
    return value / units[unit], unit
