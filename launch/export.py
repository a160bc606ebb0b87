"""Write a checkpoint in another engine's format: one GGUF file for llama.cpp and what is built on it, or DeciLM
(nemotron-nas), for which vLLM has a class of its own, with layers of different widths. What can't be held is refused.

examples:
  python launch/export.py smaller smaller.gguf --to gguf --dtype q8_0
  python launch/export.py smaller smaller-decilm --to decilm
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, make_parser, path_given
from hfprune_launch.sweep_folder import require_folder

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.export import require_gguf
from hfprune_dist.store.atomic_files import publish


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint, pruned or not")
    parser.add_argument("out", metavar="OUT", help="the file (gguf) or folder (decilm) to write; must not exist")
    parser.add_argument("--to", choices=("gguf", "decilm"), required=True, help="the format")
    told = "of a GGUF file's matrices; default: the checkpoint's, which changes no number"
    parser.add_argument("--dtype", choices=("f32", "f16", "bf16", "q8_0"), help=told)
    arguments = parser.parse_args(argv)
    if arguments.to != "gguf" and arguments.dtype:
        parser.error("--dtype is for --to gguf; DeciLM keeps the weights as they are")
    print(export(path_given(arguments.checkpoint), path_given(arguments.out).absolute(), arguments.dtype, arguments.to))
    return 0


def export(checkpoint: Path, out: Path, dtype: str | None, to: str) -> str:
    """Write a checkpoint in another format; what is written is whole once it has its name. Say what it is."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: is there already; choose another place, or remove it")
    source = open_checkpoint(checkpoint)
    require_folder(out.parent)
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of an export that died
    new.mkdir(parents=True)
    try:
        draft = new / out.name
        if to == "gguf":
            require_gguf()
            from hfprune_dist.export.gguf_file import write_gguf

            told = write_gguf(source, draft, dtype)
        else:
            from hfprune_dist.export.decilm import write_decilm

            told = write_decilm(source, draft)
        publish(draft, out)
    finally:
        shutil.rmtree(new)
    return f"{out}: {source.parameters:,} parameters; {told}"
