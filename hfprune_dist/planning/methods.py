"""Finding pruning methods by the names that a user gives."""

from __future__ import annotations

from pathlib import Path

from hfprune_dist.config.load import parse
from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.yaml_text import read_yaml
from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.planning.legality import refuse_method


def resolve_methods(config: SweepConfig, shipped: Path) -> dict[str, Method]:
    """Return the sweep's methods by name: shipped ones or YAML files, with the ``prune`` section's keys on top.

    Args:
        shipped: folder with the methods that come with the project, ``<name>.yaml``.

    Raises:
        UserError: for an unknown method, a file that isn't one, or settings that don't go together.
    """
    files = {file.stem: file for file in sorted(shipped.glob("*.yaml"))}
    on_top = config.prune.model_dump(exclude_none=True)
    methods: dict[str, Method] = {}
    seen: dict[Path, str] = {}
    for name in config.methods:
        file = files.get(name, Path(name))
        if name not in files and file.suffix not in (".yaml", ".yml"):
            raise UserError(
                f"--methods: unknown method {name!r}{did_you_mean(name, files)}; valid: {', '.join(files)}, "
                "or a YAML file"
            )
        if file.resolve() in seen:
            raise UserError(f"--methods: {seen[file.resolve()]!r} and {name!r} are the same method; name it once")
        seen[file.resolve()] = name
        if file.stem in methods:
            raise UserError(f"--methods: two methods are called {file.stem!r}; rename one of the files")
        settings = read_yaml(file, "--methods", "the keys of a method")
        where = f"{file} with prune.{', prune.'.join(on_top)}" if on_top else str(file)
        methods[file.stem] = parse(Method, {**settings, **on_top}, where)
        refuse_method(methods[file.stem], f"configuration ({where})")
    return methods
