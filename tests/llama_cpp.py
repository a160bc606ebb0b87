"""llama.cpp, built from the sdist of llama-cpp-python: its converter, and its tools that quantize and measure.

Built once, in 25 minutes on two slow cores. Everything is in a folder of the user's cache named by the sdist's hash.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

SDIST = "llama-cpp-python==0.3.35"
SHA256 = "1139dbb54509074b70893fab8554e3b079aa9f4d312058ce4018ef0019e3de12"
TARGETS = ("llama-quantize", "llama-perplexity")
OPTIONS = (
    *("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "GGML_NATIVE=OFF"),
    *(f"LLAMA_{part}=OFF" for part in ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER")),
)


class LlamaCpp:
    """The tools; creating an object builds what is missing."""

    def __init__(self) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._root = cache / "hfprune-tests" / SHA256
        self._source, self._tools = self._root / "vendor" / "llama.cpp", self._root / "tools"
        if not self._source.is_dir():
            _unpack(self._root)
        if not self._tools.is_dir():
            _install(self._tools)
        self._build()

    def convert(self, checkpoint: Path, target: Path) -> Path:
        """Convert a checkpoint folder to a file of half-precision weights."""
        script = [sys.executable, self._source / "convert_hf_to_gguf.py"]
        needs = {"PYTHONPATH": str(self._tools)}  # sentencepiece is imported for every model
        _run(*script, checkpoint, "--outtype", "f16", "--outfile", target, environment=needs)
        return target

    def quantize(self, file: Path, target: Path, kind: str) -> None:
        """Write a file with quantized matrices."""
        _run(self._root / "build" / "bin" / "llama-quantize", file, target, kind)

    def perplexity(self, file: Path, text: Path, context: int, chunks: int) -> float:
        options = ["-c", context, "-b", context, "--chunks", chunks, "-t", 2]
        output = _run(self._root / "build" / "bin" / "llama-perplexity", "-m", file, "-f", text, *options)
        (estimate,) = re.findall(r"Final estimate: PPL = ([\d.]+)", output)
        return float(estimate)

    def _build(self) -> None:
        cmake, ninja = self._tools / "cmake" / "data" / "bin" / "cmake", self._tools / "bin" / "ninja"
        options = [f"-D{option}" for option in (*OPTIONS, f"CMAKE_MAKE_PROGRAM={ninja}")]
        _run(cmake, "-S", self._source, "-B", self._root / "build", "-G", "Ninja", *options)
        _run(cmake, "--build", self._root / "build", "--target", *TARGETS)


def _unpack(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root.parent) as name:
        folder = Path(name)
        (folder / "wanted.txt").write_text(f"{SDIST} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-binary=:all:", "--no-deps", "--require-hashes"]
        _run(*pip, "--dest", folder, "--requirement", folder / "wanted.txt")
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(folder / "unpacked", filter="data")
        (unpacked,) = (folder / "unpacked").iterdir()
        unpacked.rename(root)


def _install(tools: Path) -> None:
    with TemporaryDirectory(dir=tools.parent) as name:
        packages = Path(name) / "packages"
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", packages]
        _run(*pip, "cmake<4", "ninja", "sentencepiece")
        packages.rename(tools)


def _run(*command: object, environment: dict[str, str] | None = None) -> str:
    """Run a command that must succeed, and return its output from one pipe, in which lines stay whole."""
    ended = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    said = f"{ended.stdout}\n{ended.stderr}"
    assert ended.returncode == 0, f"{command[0]}: {said[-4000:]}"
    return said
