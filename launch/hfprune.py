"""Prune large language models on a laptop or a Slurm cluster: all commands of the project under one name.

example:  hfprune sweep --models runs/demo-assets/llama --ratios 0.2 --config configs/demo.yaml
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, make_parser

from hfprune_dist.errors import did_you_mean

# Each is a module of this package with a function ``main``; a dash stands for an underscore.
COMMANDS = {
    "sweep": "prune, recover and evaluate models; the same command resumes",
    "prune": "prune one model: a checkpoint in, a smaller one out",
    "export": "write a checkpoint as GGUF (llama.cpp) or DeciLM (vLLM)",
    "check": "compare a checkpoint in an inference engine with transformers",
    "report": "write and show the tables of a sweep again",
    "compare": "compare methods over sweeps that differ in their seed",
    "clean": "remove what no row of a sweep refers to any more",
    "bench": "measure this machine, and a sweep's stages in a unit of time",
    "demo-assets": "make the demo's models, texts and tasks",
    "schema": "print the JSON schema of a YAML file, for editors",
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to the command named by the first argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        sys.argv[0] = f"hfprune {arguments[0]}"  # what parsers call the program
        module = importlib.import_module(f"hfprune_launch.{arguments[0].replace('-', '_')}")
        return int(module.main(arguments[1:]))
    parser = make_parser(__doc__)
    lines = [f"  {name:{max(map(len, COMMANDS))}}  {what}" for name, what in COMMANDS.items()]
    parser.prog, parser.epilog = "hfprune", "\n".join(["commands:", *lines, "", "hfprune COMMAND --help explains one."])
    parser.add_argument("--version", action="store_true", help="show the version, its commit and where its files are")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="one of those below, followed by its arguments")
    parsed, _ = parser.parse_known_args(arguments)
    if not parsed.version:
        given = parsed.command
        named = f"no command {given!r}{did_you_mean(given, COMMANDS)}" if given else "no command"
        parser.error(f"{named}; valid: {', '.join(COMMANDS)}")
    from hfprune_launch.project import PROJECT

    code = PROJECT.code_version()
    print(f"hfprune {code['hfprune_dist']}")
    print(f"commit: {code['git_commit'] or 'unknown'}{', with changes' if code['dirty_diff_sha256'] else ''}")
    print(f"configurations: {PROJECT.configs}")
    print(f"Slurm profiles: {PROJECT.profiles}")
    return 0
