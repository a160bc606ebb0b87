"""A checkpoint in engines against the same in transformers: log-probabilities of prompts, and tokens that follow."""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.engines import fit
from hfprune_dist.checkpoints.pruned_config import MODELING_FILE
from hfprune_dist.config.method import EngineName
from hfprune_dist.engines.process import ask, require_engine
from hfprune_dist.errors import UserError
from hfprune_dist.export import CONFIGURATION_FILE
from hfprune_dist.store.atomic_files import read_object

# For each prompt, its tokens and those that transformers chose, and log-probabilities [tokens, vocabulary] after them.
Reference = Sequence[tuple[list[int], Any]]
PROMPTS = (
    "The history of the Roman Empire begins with the city of Rome, which according to legend was founded by Romulus in",
    "In Python, a list comprehension consists of brackets around an expression, which a for clause follows, and then",
    "Question: What are the main differences between plants and animals? Answer: Plants make their own food from",
)
NEW_TOKENS = 20
# The largest difference of log-probabilities that rounding makes in float32, in nats; and how close to one another two
# tokens must be for an engine to choose the other one.
TOLERANCE = 0.01
# The folders of an absolute path: what is found gets into tables and cards, which name none of this machine.
_FOLDERS = re.compile(r"(?<![^\s'\"(=])(/[\w.][^\s/'\"]*)+/")


@dataclass(frozen=True)
class Check:
    """What an engine made of a checkpoint.

    Attributes:
        difference: the largest, of the prompts' log-probabilities, in nats; None if it didn't run, or one isn't finite.
        equal: how many of the ``tokens`` are transformers' own, up to the first of each prompt that isn't.
        failure: why it doesn't pass; empty if it does.
    """

    version: str
    difference: float | None = None
    equal: int = 0
    tokens: int = NEW_TOKENS * len(PROMPTS)
    failure: str = ""

    def line(self) -> str:
        """What it found, in one line."""
        found = [f"fails: {self.failure}"] * bool(self.failure)
        if self.difference is not None:
            found.append(f"log-probabilities within {self.difference:.1g} of transformers'")
            found.append(f"{self.equal} of {self.tokens} tokens equal")
        return f"{self.version}: {'; '.join(found)}"


def check(
    checkpoint: Path, pythons: Mapping[EngineName, str], scratch: Path | None = None, exported: Path | None = None
) -> dict[EngineName, Check]:
    """Compare a checkpoint in engines with the same in transformers.

    Args:
        pythons: engine -> the Python of an environment that has it.
        scratch: a folder for copies that engines need; None: the system's for temporary files.
        exported: what engines load in its place, made by ``hfprune export``.

    Raises:
        UserError: if there is no such checkpoint, or an engine can't run.
    """
    source, checks = open_checkpoint(checkpoint), dict[EngineName, Check]()
    if exported is not None and not exported.exists():
        raise UserError(f"{exported}: no such file or folder")
    for engine, python in pythons.items():
        require_engine(engine, python)
    reference = _reference(checkpoint)
    for engine, python in pythons.items():
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            loaded = exported or source.path
            if engine == "llama.cpp" and exported is None:
                from hfprune_dist.export.gguf_file import write_gguf  # which needs gguf

                loaded = Path(folder) / "model.gguf"
                try:
                    write_gguf(source, loaded, "f32")
                except UserError as error:
                    checks[engine] = Check("hfprune export", failure=_without_folders(str(error), source.path))
                    continue
            request = {"model": str(loaded), "sequences": [ids for ids, _ in reference], "new_tokens": NEW_TOKENS}
            options = {} if exported else fit(engine, source.config).options
            request["options"] = {"trust_remote_code": trusts(loaded), **options}
            answer = ask(engine, python, Path(folder), request)
        said = _without_folders(answer.get("error", ""), loaded)
        failed = Check(answer["version"], failure=said) if "error" in answer else None
        checks[engine] = failed or compared(answer["version"], reference, answer["runs"])
    return checks


def _without_folders(said: str, loaded: Path) -> str:
    return _FOLDERS.sub("", said.replace(str(loaded), loaded.name))


def _reference(checkpoint: Path) -> Reference:
    import torch
    from transformers import GenerationConfig

    from hfprune_dist.data.tokenizer import load_tokenizer
    from hfprune_dist.models.loading import load_causal_lm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = load_tokenizer(checkpoint), load_causal_lm(checkpoint, torch.float32, device).eval()
    model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)  # beyond any end of text
    reference = []
    with torch.inference_mode():
        for text in PROMPTS:
            ids, rows = tokenizer(text).input_ids, model.get_input_embeddings().num_embeddings
            if max(ids) >= rows:
                raise UserError(
                    f"{checkpoint}: its tokenizer gives the token {max(ids)}, its embedding has {rows} rows"
                )
            ids_BT = model.generate(torch.tensor([ids], device=device))
            log_probs_BTV = model(input_ids=ids_BT, use_cache=False).logits.double().log_softmax(dim=-1)
            reference.append((ids_BT[0].tolist(), log_probs_BTV[0].cpu()))
    del model, ids_BT, log_probs_BTV
    gc.collect()
    torch.cuda.empty_cache()  # for the engine
    return reference


def trusts(loaded: Path) -> bool:
    """Whether all code that a checkpoint brings along is ours, letter for letter; no other is run."""
    code = (read_object(loaded / "config.json") or {}).get("auto_map")
    ours = {file.name: file.read_bytes() for file in (MODELING_FILE, CONFIGURATION_FILE)}
    return "--" not in str(code) and all(file.read_bytes() == ours.get(file.name) for file in loaded.glob("*.py"))


def compared(version: str, reference: Reference, runs: Sequence[Mapping[str, Any]]) -> Check:
    """What the runs of an engine differ in. Where tokens part, those that follow say nothing."""
    import torch

    difference, equal, behind, failure = torch.zeros(()), 0, 0.0, ""
    for (ids, log_probs_TV), run in zip(reference, runs, strict=True):
        start = len(ids) - NEW_TOKENS
        wanted = log_probs_TV[range(start - 1), ids[1:start]]
        apart = (wanted - torch.tensor(run["log_probs"][: start - 1], dtype=torch.float64)).abs()
        difference = torch.maximum(difference, apart.max())  # NaN stays
        for row_V, token, chosen in zip(log_probs_TV[start - 1 : -1], ids[start:], run["new"], strict=True):
            if token != chosen:
                behind = max(behind, float(row_V[token] - row_V[chosen]))
                break
            equal += 1
    if not difference <= TOLERANCE:
        failure = f"log-probabilities differ by more than {TOLERANCE:g}"
    elif behind > TOLERANCE:
        failure = f"it chooses a token that transformers has {behind:.2g} nats behind another"
    return Check(version, float(difference) if difference.isfinite() else None, equal, failure=failure)
