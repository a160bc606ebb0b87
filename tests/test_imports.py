"""Import rules: data flows one way, some rooms must not know each other, and login nodes need no torch."""

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from hfprune_launch.hfprune import COMMANDS

from hfprune_dist.config.parameters import KINDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"hfprune_dist": "hfprune_dist", "hfprune_launch": "launch"}
MODULES = ["hfprune", *(name.replace("-", "_") for name in COMMANDS)]
# These don't wait for torch, so that a login node answers at once.
TORCH_FREE = [
    *(f"hfprune_dist.{room}" for room in ("config", "store", "kinds", "planning", "report", "results", "structures")),
    *("hfprune_dist.engines", "hfprune_dist.checkpoints.engines", "hfprune_dist.core.criterion"),
    *(f"hfprune_dist.checkpoints.{name}" for name in ("checkpoint", "families", "weight_files")),
    *(f"hfprune_dist.checkpoints.{name}" for name in ("layer_settings", "pruned_config")),
    *(f"hfprune_launch.{name}" for name in ("hfprune", "sweep", "prune", "check", "export", "report", "compare")),
    *(f"hfprune_launch.{name}" for name in ("clean", "schema", "local.backend")),
]
# Libraries that take a rank some tenths of a second each to import -> kinds of stages that import them in any case.
# Others do so only in what needs them: sharding a model, running lm-eval's tasks, a data set of the hub.
TRAINING = {"recover", "loraprune"}
HEAVY = {"peft": TRAINING}
HEAVY |= {name: set() for name in ("deepspeed", "datasets", "pandas", "lm_eval", "tensorboard")}


def name_of(file):
    """Return a module's name, from its place in the project."""
    package = next(package for package, folder in PACKAGES.items() if file.is_relative_to(ROOT / folder))
    parts = file.relative_to(ROOT / PACKAGES[package]).with_suffix("").parts
    return ".".join([package, *parts]).removesuffix(".__init__")


def modules(package):
    return {name_of(file): file for file in (ROOT / PACKAGES[package]).rglob("*.py")}


@functools.cache
def imports_of(file):
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" if hasattr(node, "module") else alias.name for alias in node.names]
    return found


def room_of(module):
    return ".".join(module.split(".")[:2])


def arrows():
    """Yield (module, imported) across rooms of both packages."""
    for package in PACKAGES:
        for module, file in modules(package).items():
            for name in imports_of(file):
                if name.startswith(tuple(PACKAGES)) and room_of(name) != room_of(module):
                    yield module, name


def rooms(package, *names):
    return {f"{package}.{name}" for name in names}


PHASES = rooms("hfprune_dist", "scoring", "refit", "training", "evaluation")
BACKENDS, COMMAND_ROOMS = rooms("hfprune_launch", "local", "slurm"), rooms("hfprune_launch", *MODULES)
LIBRARY, LAUNCH = ({room_of(name) for name in modules(package)} for package in PACKAGES)
# Rooms -> those that they import nothing from, besides themselves.
NEVER = [(LIBRARY, LAUNCH), (PHASES, PHASES), (BACKENDS, BACKENDS | COMMAND_ROOMS), (COMMAND_ROOMS, COMMAND_ROOMS)]
# Libraries -> the rooms of those that may import them.
KNOWN_TO = {
    ("torch.distributed", "deepspeed"): rooms("hfprune_dist", "distributed", "scoring", "refit", "training", "stages"),
    ("submitit",): LAUNCH,
}


def test_tests_mirror_the_rooms():
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert rooms("hfprune_dist", *folders - {"launch", "slurm", "faults", "gpu"}) <= LIBRARY


def test_no_circle():
    graph = {}
    for module, name in arrows():
        graph.setdefault(room_of(module), set()).add(room_of(name))
    assert list(TopologicalSorter(graph).static_order())


def test_core_imports_torch_and_itself_only():
    for module, file in modules("hfprune_dist").items():
        for name in imports_of(file) if room_of(module) == "hfprune_dist.core" else ():
            allowed = name.split(".")[0] in {"torch", *sys.stdlib_module_names} or name.startswith("hfprune_dist.core")
            assert allowed, f"{module} imports {name}"


def test_some_rooms_never_import_others():
    for importers, imported in NEVER:
        known = [arrow for arrow in arrows() if room_of(arrow[0]) in importers and room_of(arrow[1]) in imported]
        assert known == []


def test_some_libraries_are_known_to_few_rooms():
    for libraries, allowed in KNOWN_TO.items():
        for package in PACKAGES:
            for module, file in modules(package).items():
                knows = any(name.startswith(libraries) for name in imports_of(file))
                assert not knows or room_of(module) in allowed, module


def test_stages_are_imported_by_none_of_their_room():
    """Parts that a stage consists of, or that stages share, may be imported."""
    stages = {f"hfprune_dist.stages.{kind}" for kind in KINDS}
    room = {name for name in modules("hfprune_dist") if name.startswith("hfprune_dist.stages.")}
    assert stages <= room
    for module in room:
        for name in imports_of(modules("hfprune_dist")[module]):
            others = tuple(f"{stage}." for stage in stages - {module})
            assert not f"{name}.".startswith(others), f"{module} imports {name}"


def test_the_login_node_never_waits_for_torch():
    """All imports in one process, which reports the first that brings in a large library."""
    names = [
        name
        for module in TORCH_FREE
        for name in modules(module.split(".")[0])
        if name == module or name.startswith(f"{module}.")
    ]
    assert len(names) > len(TORCH_FREE)
    script = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    if large := {{'torch', 'transformers', 'deepspeed'}} & set(sys.modules):
        sys.exit(f"{{name}} imports {{large}}")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_stages_wait_for_no_library_that_they_may_not_need():
    """One process imports all kinds, those that may import the least first."""
    kinds = sorted(KINDS, key=lambda kind: sum(kind in those for those in HEAVY.values()))
    unneeded = {kind: [name for name, those in HEAVY.items() if kind not in those] for kind in kinds}
    script = f"""
import gc, importlib, sys
gc.disable()
importlib.import_module("hfprune_launch.stage.run")
importlib.import_module("hfprune_dist.stages.context")
for kind, unneeded in {unneeded}.items():
    importlib.import_module(f"hfprune_dist.stages.{{kind}}")
    if large := sorted(set(unneeded) & set(sys.modules)):
        sys.exit(f"hfprune_dist.stages.{{kind}} imports {{large}}")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


UNCHANGED = """
import importlib, os, sys
ours, libraries = {ours!r}, {libraries!r}
def foreign():
    return [name for name in sys.modules if name.partition(".")[0] in libraries]
def attributes():
    for name in foreign():
        for attribute, value in vars(sys.modules[name]).items():
            yield (name, attribute), value
            if isinstance(value, type) and value.__module__ == name:
                yield from (((name, attribute, inner), kept) for inner, kept in vars(value).items())
read, write = os.pipe()
if not os.fork():  # finds out which modules of libraries ours import
    for name in ours:
        importlib.import_module(name)
    with open(write, "w") as file:
        file.write("\\n".join(foreign()))
    os._exit(0)
os.close(write)
with open(read) as file:
    for name in file.read().split("\\n"):
        try:
            importlib.import_module(name)
        except ImportError:  # made up by a library while it runs
            pass
before = dict(attributes())
for name in ours:
    importlib.import_module(name)
after = dict(attributes())
changed = [".".join(place) for place, value in before.items() if after.get(place) is not value]
assert len(before) > 10_000 and not changed, changed
"""


def test_importing_changes_nothing_of_libraries():
    ours = [name_of(file) for file in (ROOT / "hfprune_dist").rglob("*.py")]
    script = UNCHANGED.format(ours=sorted(ours), libraries=("torch", "transformers", "peft", "deepspeed"))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
