"""Files of a checkpoint that state its licence, by the names that publishers give them."""

from __future__ import annotations

from fnmatch import fnmatchcase

_WORDS = ("license", "licence", "copying", "copyright", "notice", "use_policy")


def _in_any_case(word: str) -> str:
    return "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in word)


# Globs for names with one of the words at the beginning, or after a dash or an underscore: License.txt, MODEL_LICENSE.
LICENCE_PATTERNS = tuple(f"{start}{_in_any_case(word)}*" for word in _WORDS for start in ("", "*[-_]"))


def is_licence(name: str) -> bool:
    """Whether a file of this name, relative to its checkpoint's folder, states a licence."""
    return any(fnmatchcase(name, pattern) for pattern in LICENCE_PATTERNS)
