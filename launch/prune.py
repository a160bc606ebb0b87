"""Prune one model: a checkpoint in, a smaller one out. OUT has weights, tokenizer, config.json and a card, and needs
nothing else. The same command resumes after an interruption; another ratio reuses the scores.

examples:
  python launch/prune.py runs/demo-assets/llama smaller --ratio 0.3 --config configs/demo.yaml
  python launch/prune.py Qwen/Qwen2.5-0.5B smaller --ratio 0.3 --text notes.txt
  python launch/prune.py Qwen/Qwen2.5-0.5B smaller --ratio 0.2 --recover --set calibration.samples=128 --dry-run

Work is kept in $XDG_CACHE_HOME/hfprune, else ~/.cache/hfprune: a sweep's folder for each model, safe to delete.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, expanded_path, make_parser, path_given
from hfprune_launch.dry_run import show_dry_run
from hfprune_launch.prepare import Request, prepare
from hfprune_launch.project import PROJECT
from hfprune_launch.run import StageFailedError, make, only
from hfprune_launch.screen import make_console
from hfprune_launch.sweep_folder import Sweep, read_sweep, record_run, require_apart, require_folder

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.engines import ENGINES
from hfprune_dist.config.load import load_config, parse_assignments
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.data.text import CHECKED_CHARACTERS, read_beginning, read_texts
from hfprune_dist.errors import UserError
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import resolve_models
from hfprune_dist.planning.plan import Cell
from hfprune_dist.results.card import CARD, NEEDS_CODE, RECIPE, Card
from hfprune_dist.results.checkpoints import CHECKPOINTS, made_checkpoint
from hfprune_dist.results.metrics import METRICS
from hfprune_dist.store.atomic_files import publish, write_jsonl, write_text
from hfprune_dist.store.hashing import FileHashes, digest_of

METHOD = "surgeon-plain"
HELD_OUT = 0.1  # share of a text, at its end
CHARACTERS = 6  # in a token, at most, of most texts


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    parser = make_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder, an alias (configs/models), or a hub id")
    parser.add_argument("out", metavar="OUT", help="folder for the smaller checkpoint; empty or nonexistent")
    parser.add_argument("--ratio", type=float, required=True, help="removed / all parameters of the model, in (0, 1)")
    text = "calibration text, whose end is held out for comparison; default: --config's, else C4"
    parser.add_argument("--text", metavar="FILE", type=path_given, help=text)
    parser.add_argument("--method", default=METHOD, help=f"one of configs/methods, or a YAML file; default: {METHOD}")
    engines = f"keep to shapes that these load, if they support the model's family: {', '.join(ENGINES)}"
    parser.add_argument("--for", metavar="A,B", dest="engines", type=lambda text: text.split(","), help=engines)
    told = "train with LoRA afterwards: on pairs in a file, or on the default data set"
    parser.add_argument("--recover", metavar="FILE", type=path_given, nargs="?", const=True, default=False, help=told)
    parser.add_argument(
        "--config", metavar="FILE", type=expanded_path, action="append", default=[], help="YAML settings"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="set any key of a sweep")
    parser.add_argument("--dry-run", action="store_true", help="show the stages, and the model's shape; runs nothing")
    arguments = vars(parser.parse_args(argv))
    try:
        prune(settings=parse_assignments(arguments.pop("set")), **arguments)
    except StageFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prune(
    model: str | Path,
    out: str | Path,
    ratio: float,
    *,
    text: str | Path | None = None,
    method: str = METHOD,
    recover: bool | str | Path = False,
    engines: Sequence[str] | None = None,
    config: str | Path | Sequence[str | Path] = (),
    settings: dict[str, Any] | None = None,
    dry_run: bool = False,
) -> Path:
    """Prune a model, write it to a folder of its own, whose path is returned, and tell what became of it.

    Args:
        out: empty, or not there.
        text: on which the model is pruned and, at its end, compared; by default, that of ``config``, else C4.
        engines: those whose shapes to keep to, if they support the model's family.
        recover: whether to train with LoRA afterwards; or a file of pairs to train on.
        config, settings: files, and keys such as ``calibration.samples``, of a sweep (``config/schema.py``).
        dry_run: tell what would run, and run nothing.

    Raises:
        UserError: for bad input.
        StageFailedError: if a stage fails.
    """
    out = path_given(str(out)).resolve()
    for place_of_writing in (out, out.parent):  # it is written beside its place, and then renamed
        require_folder(place_of_writing)
    held = made_checkpoint(out)
    if out.is_mount():
        raise UserError(f"{out}: a file system is mounted there, which no folder can replace; choose a folder in it")
    if held is None and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: not empty, and not written by this command; choose another folder")
    config = [config] if isinstance(config, (str, Path)) else config
    files = [PROJECT.configs / "prune.yaml", *(expanded_path(str(file)) for file in config)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "hfprune"
    overrides = {**(settings or {}), "models": [str(model)], "ratios": [ratio], "methods": [method]}
    if engines is not None:
        overrides["prune.for_engines"] = list(engines)
    if recover:
        overrides = {"recovery.method": "lora"} | overrides
        overrides |= {} if recover is True else {"recovery.path": str(recover)}
    if text is not None:
        overrides |= _parts_of(expanded_path(str(text)), load_config(files, overrides, PROJECT.configs), cache)
    configured = load_config(files, overrides, PROJECT.configs)
    resolve_methods(configured, PROJECT.configs / "methods")  # which takes no download
    hashes = FileHashes(cache / "hashes")
    (source,) = resolve_models(configured, PROJECT.configs / "models", hashes, download=not dry_run)
    request = Request(cache / f"{source.name}-{source.identity[:10]}", make_console(), files, overrides)
    prepared = prepare(request, download=not dry_run)
    cell, *others = [cell for cell in prepared.sweep.plan.cells if cell.ratio is not None]
    if others:
        raise UserError("recovery.recipes, rounds: here, one checkpoint takes one recipe and no rounds; run sweep.py")
    prepared = only(prepared, [cell.producers[-1], *filter(None, [cell.check]), cell.evaluate])
    require_apart(out, prepared.sweep.plan)
    if dry_run:
        show_dry_run(prepared)
        return out
    if held not in (None, cell.producers[-1]):
        raise UserError(f"{out}: holds a checkpoint of other settings; choose another folder, or remove it")
    if held is not None:
        request.tell(f"{out} is there already, made with these settings")
    else:
        hashes.save()
        make(prepared)
        record_run(prepared.sweep, prepared.config, prepared.models)  # another command may have replaced its row
        request.tell(_write(read_sweep(request.out), cell, out))
    code = ", trust_remote_code=True" if (out / NEEDS_CODE).exists() else ""
    has_vision = open_checkpoint(out).family.has_vision
    model_class = "AutoModelForImageTextToText" if has_vision else "AutoModelForCausalLM"
    request.tell(f'to load it: {model_class}.from_pretrained("{out}"{code})')
    if text is not None:
        parts = Path(overrides["calibration.path"]).parent
        request.tell(f"to make it again, put the files in {parts} beside {RECIPE}")
    return out


def _parts_of(text: Path, config: SweepConfig, cache: Path) -> dict[str, str | None]:
    """Settings for a text, of a long one its beginning: most to prune on, the end to compare on, in cached files. If it
    has too few documents for the windows, each document is cut into several.
    """
    read = read_beginning(read_texts({}, text, config.calibration.text_field, 0, "--text")).records
    documents = [document[:CHECKED_CHARACTERS] for document in read]
    left, kept, held_out = int((1 - HELD_OUT) * sum(map(len, documents))), list[str](), list[str]()
    for document in documents:
        cut = max(left, 0)
        kept.append(document[:cut])
        held_out.append(document[cut:])
        left -= len(document)
    calibration, fidelity = config.calibration, config.evaluation.fidelity
    sizes = [(calibration.samples, calibration.sequence_length), (fidelity.windows, fidelity.sequence_length)]
    folder = cache / "texts" / digest_of([documents, sizes])[:10]
    overrides: dict[str, str | None] = {"calibration.mixture": None, "evaluation.fidelity.texts": None}
    for section, part, windows, tokens, end in (
        ("calibration", kept, *sizes[0], ""),
        ("evaluation.fidelity", held_out, *sizes[1], "-end"),
    ):
        whole = sum(len(document) >= CHARACTERS * tokens for document in part)
        longest = CHECKED_CHARACTERS if whole >= windows else sum(map(len, part)) // (windows + sum(map(bool, part)))
        longest = max(longest, CHARACTERS * tokens)
        pieces = [document[at : at + longest] for document in part for at in range(0, len(document), longest)]
        file = folder / f"{text.absolute().stem}{end}.jsonl"  # which cards name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, ({"text": piece} for piece in pieces))
        overrides |= {f"{section}.path": str(file), f"{section}.text_field": "text"}
    return overrides


def _write(sweep: Sweep, cell: Cell, out: Path) -> str:
    """Copy a row's checkpoint, with its card, to a folder that is whole once it has its name; say what it is."""
    update = sweep.write_checkpoints()
    rows = dict(zip(sweep.plan.cells, sweep.rows(), strict=True))
    row = rows[cell]
    if not row["checkpoint"].startswith(CHECKPOINTS):
        raise UserError("; ".join(update.remarks))
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(sweep.out / row["checkpoint"], new)
    write_text(new / CARD, Card(out.name, cell, rows, sweep.plan, sweep.store, sweep.dense[cell.model]).text())
    publish(new, out)
    parameters, share, kl = (METRICS[key].shown(row) for key in ("parameters", "share_kept", "kl"))
    measured = f"KL {kl} nats per token on {row['windows']} held-out windows"
    return f"{out}: {parameters} parameters, {share} % of the dense model's; {measured}"
