"""Docstrings of the standard library, read with ``ast``: nothing is imported, so nothing is executed."""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfprune_launch.demo.prose import one_line

# Not for readers (private data), or not part of every installation (test suites, graphics).
SKIPPED = {"test", "idlelib", "lib2to3", "tkinter", "turtledemo", "pydoc_data", "encodings", "turtle", "distutils"}
# One in this many modules is reserved for the benchmark and gives no instruction pairs.
BENCHMARK_SHARE = 4
RESPONSE_WORDS = range(15, 121)
MARKUP = re.compile(r">>>|::|\.\. |[|`@{}\\]|--")


@dataclass(frozen=True)
class Documented:
    """A public function, class or method and its docstring.

    Attributes:
        module: top-level module, e.g. ``json``.
        name: dotted name, e.g. ``json.decoder.JSONDecoder.decode``.
        signature: beginning of its definition, e.g. ``def decode(s, _w)``.
        paragraphs: the docstring's paragraphs, each on one line.
    """

    module: str
    name: str
    signature: str
    paragraphs: tuple[str, ...]

    @property
    def is_for_benchmark(self) -> bool:
        return _checksum(self.module) % BENCHMARK_SHARE == 0


def standard_library() -> list[Documented]:
    """Return everything public and documented in the standard library, in order of file and line."""
    root = Path(sysconfig.get_path("stdlib"))
    return [item for file in source_files(root) for item in documented_in(file, root)]


def source_files(root: Path) -> list[Path]:
    """Return the source files of public standard modules, without site-packages and other people's files."""
    modules = sorted(set(sys.stdlib_module_names) - SKIPPED)
    candidates = [
        file
        for module in modules
        if not module.startswith("_")
        for file in [root / f"{module}.py", *sorted((root / module).rglob("*.py"))]
    ]
    return [file for file in candidates if file.is_file() and not _is_private(file.relative_to(root))]


def documented_in(file: Path, root: Path) -> Iterator[Documented]:
    """Yield public definitions of a source file that have a docstring, including methods of public classes."""
    parts = file.relative_to(root).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in string literals
        tree = ast.parse(file.read_bytes())
    yield from _walk(tree, module, parts[0])


def _walk(node: ast.Module | ast.ClassDef, prefix: str, module: str) -> Iterator[Documented]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        docstring = ast.get_docstring(child)
        if docstring:
            paragraphs = tuple(one_line(block) for block in re.split(r"\n\s*\n", docstring) if block.strip())
            yield Documented(module, name, _signature(child), paragraphs)
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, name, module)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    arguments = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
    return f"def {node.name}({', '.join(name for name in arguments if name not in ('self', 'cls'))})"


def instruction_pairs(library: Iterable[Documented]) -> list[dict[str, str]]:
    """Return a question about each definition, answered by the beginning of its docstring; no answer occurs twice.

    The order mixes modules, so that the first few hundred pairs are a fair sample.
    """
    pairs: dict[str, dict[str, str]] = {}
    for item in library:
        response = _response(item)
        if response and not item.is_for_benchmark:
            instruction = f"What does `{item.name}` do in Python?"
            pairs.setdefault(response.casefold(), {"instruction": instruction, "response": response})
    return sorted(pairs.values(), key=lambda pair: (_checksum(pair["instruction"]), pair["instruction"]))


def summaries(library: Sequence[Documented], words: range) -> list[tuple[Documented, str]]:
    """Return the benchmark's definitions with one-line summaries; none occurs twice or in an instruction pair."""
    trained_on = "\n".join(" ".join(item.paragraphs).casefold() for item in library if not item.is_for_benchmark)
    chosen: dict[str, tuple[Documented, str]] = {}
    for item in library:
        summary = item.paragraphs[0]
        fits = item.is_for_benchmark and _is_sentence(summary) and len(summary.split()) in words
        if fits and summary.casefold() not in trained_on:
            chosen.setdefault(summary.casefold(), (item, summary))
    return list(chosen.values())


def _response(item: Documented) -> str | None:
    """Return the first paragraph, or the first two if the first is only a line; None if they are not plain prose."""
    for count in (1, 2):
        response = " ".join(item.paragraphs[:count])
        if all(map(_is_sentence, item.paragraphs[:count])) and len(response.split()) in RESPONSE_WORDS:
            return response
    return None


def _is_sentence(paragraph: str) -> bool:
    return paragraph[0].isupper() and paragraph.endswith(".") and not MARKUP.search(paragraph)


def _checksum(text: str) -> int:
    # Unlike hash(), the same in every process.
    return zlib.crc32(text.encode())


def _is_private(file: Path) -> bool:
    return any(part.startswith("_") and part != "__init__.py" for part in file.parts) or "test" in file.parts
