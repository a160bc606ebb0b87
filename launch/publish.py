"""Push a named checkpoint of a sweep to the Hugging Face hub.

examples:
  python launch/publish.py runs/demo llama-0.2-hfprune-lora me/llama-pruned --dry-run     files, and what the card lacks
  python launch/publish.py runs/demo llama-0.2-hfprune-lora me/llama-pruned --private

The folder checkpoints/NAME is pushed as it is, including its card, README.md, which you may edit first. An adapter
whose base is not on the hub is left out, since nobody else could load it; the weights already contain it. Log in with
`hf auth login` first. A dry run needs no network, and checks what can be checked without one.

exit codes: 0 done; 2 bad input, or the hub refused
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    import installed  # noqa: F401

from hfprune_launch.command import folder, make_parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and publish."""
    return run(lambda: _publish(argv))


def _publish(argv: Sequence[str] | None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=folder, help="folder of a sweep, e.g. runs/demo")
    parser.add_argument("name", help="name of a folder in its checkpoints/, e.g. llama-0.2-hfprune-lora")
    parser.add_argument("repo_id", help="repository on the hub, e.g. me/llama-pruned; created if it doesn't exist")
    parser.add_argument(
        "--private", action="store_true", help="make the repository private; refuse one that exists and is public"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be pushed; pushes nothing")
    arguments = parser.parse_args(argv)
    from hfprune_launch.modes.publish import publish

    publish(arguments.out, arguments.name, arguments.repo_id, private=arguments.private, dry_run=arguments.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
