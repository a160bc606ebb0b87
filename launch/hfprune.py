"""Prune large language models on a laptop or a Slurm cluster: all commands of the project under one name.

example:  hfprune sweep --models runs/demo-assets/llama --ratios 0.2 --config configs/demo.yaml
"""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import make_parser, run

from hfprune_dist.errors import did_you_mean

# Each is a module of this package with a function ``main``; a dash stands for an underscore.
COMMANDS = {
    "sweep": "prune, recover and evaluate models; the same command resumes",
    "status": "show the state of every stage of a sweep",
    "report": "write and show the tables of a sweep again",
    "compare": "compare methods over sweeps that differ in their seed",
    "clean": "remove what no row of a sweep refers to any more",
    "bench": "measure what the calibration pass costs",
    "demo-assets": "make the demo's models, texts and tasks",
    "schema": "print the JSON schema of a YAML file, for editors",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to the command named by the first argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return _main_of(arguments[0])(arguments[1:])
    return run(lambda: _without_command(arguments))


def _main_of(name: str) -> Callable[[Sequence[str]], int]:
    sys.argv[0] = f"hfprune {name}"  # what parsers call the program
    main: Callable[[Sequence[str]], int] = importlib.import_module(f"hfprune_launch.{name.replace('-', '_')}").main
    return main


def _without_command(arguments: Sequence[str]) -> int:
    parser = _parser()
    parsed, _ = parser.parse_known_args(arguments)
    if not parsed.version:
        given = parsed.command
        named = f"no command {given!r}{did_you_mean(given, COMMANDS)}" if given else "no command"
        parser.error(f"{named}; valid: {', '.join(COMMANDS)}")
    print(_version())
    return 0


def _parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    parser.prog, parser.epilog = "hfprune", "\n".join(["commands:", *lines, "", "hfprune COMMAND --help explains one."])
    parser.add_argument("--version", action="store_true", help="show the version, its commit and where its files are")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="one of those below, followed by its arguments")
    return parser


def _version() -> str:
    from hfprune_launch.project import PROJECT

    code = PROJECT.code_version()
    changed = ", with changes" if code["dirty_diff_sha256"] else ""
    return "\n".join(
        [
            f"hfprune {code['hfprune_dist']}",
            f"commit: {code['git_commit'] or 'unknown'}{changed}",
            f"configurations: {PROJECT.configs}",
            f"Slurm profiles: {PROJECT.profiles}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
