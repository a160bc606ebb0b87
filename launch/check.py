"""Run three prompts on a checkpoint in an inference engine, and compare log-probabilities and tokens with
transformers', in float32. What it finds takes the place of the engine's line in the checkpoint's card. Copies that the
engine needs are made in $TMPDIR, else /tmp, and removed.

examples:
  python launch/check.py smaller --engine llama.cpp
  python launch/check.py smaller --engine vllm --python /opt/vllm/bin/python     an environment of its own
  python launch/check.py smaller --engine vllm --exported smaller-decilm         what hfprune export has made of it

exit codes: 0 the engine computes the same; 1 it fails, or computes something else; 2 bad input, or it can't run here
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, expanded_path, make_parser, path_given
from hfprune_launch.sweep_folder import SWEEP_FILE

from hfprune_dist.checkpoints.engines import ENGINES
from hfprune_dist.engines.check import check
from hfprune_dist.results.card import CARD
from hfprune_dist.results.markdown import escaped
from hfprune_dist.store.atomic_files import write_text


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path_given, help="a checkpoint's folder")
    parser.add_argument("--engine", required=True, choices=ENGINES, help="what is to load it")
    python = "the Python of an environment that has the engine; default: this one"
    parser.add_argument("--python", metavar="FILE", default=sys.executable, help=python)
    exported = "what the engine loads in its place; llama.cpp, by default: a GGUF file in float32, made for the check"
    parser.add_argument("--exported", metavar="PATH", type=expanded_path, help=exported)
    arguments = parser.parse_args(argv)
    (found,) = check(arguments.checkpoint, {arguments.engine: arguments.python}, None, arguments.exported).values()
    print(f"{arguments.engine}: {found.line()}")
    note_in_card(arguments.checkpoint, arguments.engine, found.line())
    return 1 if found.failure else 0


def note_in_card(checkpoint: Path, engine: str, found: str) -> None:
    """Replace an engine's line in a checkpoint's card. In a sweep's folder, ``engines`` does that."""
    card = checkpoint / CARD
    if not card.exists() or (checkpoint.resolve().parent.parent / SWEEP_FILE).exists():
        return
    text = card.read_text(encoding="utf-8")
    noted = re.sub(rf"^- {re.escape(engine)}: .*$", lambda _: f"- {engine}: {escaped(found)}", text, flags=re.MULTILINE)
    if noted != text:
        write_text(card, noted)
        print(f"written to {card}")
