"""Print the JSON schema of a kind of YAML file, so that editors can complete and explain keys and mark mistakes.

examples:
  python launch/schema.py > sweep.schema.json
  python launch/schema.py profile > profile.schema.json

The YAML language server (in VS Code, the YAML extension) uses the schema named in a file's first line:
  # yaml-language-server: $schema=sweep.schema.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, make_parser
from hfprune_launch.slurm.profile import ProfileFile

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import ModelAlias, SweepConfig
from hfprune_dist.config.section import Section

# Kind of YAML file -> the class that defines what it may contain.
KINDS: dict[str, type[Section]] = {"sweep": SweepConfig, "method": Method, "profile": ProfileFile, "model": ModelAlias}
MEANING = (
    "sweep: a configuration (--config); method: a pruning method (--methods); profile: a Slurm profile (--profile); "
    "model: an alias of a model (configs/models); default: sweep"
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print the schema."""
    parser = make_parser(__doc__)
    parser.add_argument("kind", choices=KINDS, nargs="?", default="sweep", help=MEANING)
    arguments = parser.parse_args(argv)
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    print(json.dumps(dialect | KINDS[arguments.kind].model_json_schema(), indent=1))
    return 0
