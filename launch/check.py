"""Run three prompts on a checkpoint in an engine that serves models, and compare log-probabilities and tokens with
transformers', in float32. What is found becomes a line of the checkpoint's card.

examples:
  python launch/check.py smaller --engine llama.cpp
  python launch/check.py smaller --engine vllm --python /opt/vllm/bin/python     an environment of its own
  python launch/check.py smaller --engine llama.cpp --exported smaller.gguf      what hfprune export has made of it

exit codes: 0 the engine computes the same; 1 it fails, or computes something else; 2 bad input, or no such engine
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, folder, make_parser, place

from hfprune_dist.checkpoints.engines import ENGINES
from hfprune_dist.engines.check import TOLERANCE, check, with_line
from hfprune_dist.results.card import CARD
from hfprune_dist.store.artifacts import MANIFEST
from hfprune_dist.store.atomic_files import write_text


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=folder, help="a checkpoint's folder")
    parser.add_argument("--engine", required=True, choices=ENGINES, help="what is to load it")
    python = "the Python of an environment that has the engine; default: this one"
    parser.add_argument("--python", metavar="FILE", default=sys.executable, help=python)
    exported = "what the engine loads in its place; llama.cpp, by default: a GGUF file in float32, made for the check"
    parser.add_argument("--exported", metavar="PATH", type=place, help=exported)
    tolerance = f"the largest difference of log-probabilities that passes, in nats; default: {TOLERANCE}"
    parser.add_argument("--tolerance", metavar="NATS", type=float, default=TOLERANCE, help=tolerance)
    arguments = parser.parse_args(argv)
    checkpoint, engine = arguments.checkpoint, arguments.engine
    found = check(engine, checkpoint, str(place(arguments.python)), arguments.exported, arguments.tolerance)
    print(f"{engine}: {found.line()}")
    card = checkpoint / CARD
    if card.exists() and not (checkpoint / MANIFEST).exists():  # nothing is added to an artifact in a store
        write_text(card, with_line(card.read_text(encoding="utf-8"), found))
        print(f"written to {card}")
    return 1 if found.failure else 0
