"""Files of a checkpoint that state its licence, by the names that publishers give them."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

_WORDS = ("license", "licence", "copying", "copyright", "notice", "use_policy")


def _globs(word: str) -> Iterator[str]:
    """Globs for names with this word, or its plural, at the beginning or after a dash or an underscore: License.txt,
    MODEL_LICENSES. The word ends there, or is followed by a version or a capital letter: COPYINGv3,
    LicenseAgreement.pdf, but not licensed.md.
    """
    in_any_case = "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in word)
    for start in ("", "*[-_]"):
        for whole in (in_any_case, f"{in_any_case}[Ss]"):
            yield f"{start}{whole}"
            yield f"{start}{whole}[!A-Za-z]*"
            yield f"{start}{whole}[Vv][0-9]*"
        yield f"{start}[{word[0].upper()}{word[0]}]{word[1:]}[A-Z]*"


LICENCE_PATTERNS = tuple(glob for word in _WORDS for glob in _globs(word))


def is_licence(name: str) -> bool:
    """Whether a file of this name, relative to its checkpoint's folder, states a licence."""
    return any(fnmatchcase(name, pattern) for pattern in LICENCE_PATTERNS)
