"""The rules of the house: data flows one way, and the torch-free part stays torch-free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH_FREE = ["config", "plan", "artifacts", "report", "claims", "progress", "models.sources", "models.checkpoint"]


def imports_of(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def modules(*folders):
    return [file for folder in folders for file in (ROOT / folder).rglob("*.py")]


def test_core_imports_torch_and_itself_only():
    for file in modules("hfprune_dist/core"):
        for name in imports_of(file):
            allowed = name.split(".")[0] in {"torch", *sys.stdlib_module_names} or name.startswith("hfprune_dist.core")
            assert allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_the_package_never_imports_launch():
    for file in modules("hfprune_dist"):
        assert not any(name.split(".")[0] == "launch" for name in imports_of(file)), file


def test_stages_never_import_each_other():
    stages = {file.stem for file in modules("hfprune_dist/stages")} - {"__init__", "context"}
    for file in modules("hfprune_dist/stages"):
        for name in imports_of(file):
            assert name.removeprefix("hfprune_dist.stages.") not in stages or "." not in name, f"{file} imports {name}"


def test_only_parallel_and_stages_know_about_processes():
    allowed = {ROOT / "hfprune_dist" / "parallel", ROOT / "hfprune_dist" / "stages"}
    for file in modules("hfprune_dist", "launch"):
        names = set(imports_of(file))
        distributed = any(name.startswith(("torch.distributed", "deepspeed")) for name in names)
        assert not distributed or allowed & set(file.parents), file


def test_submitit_is_known_to_launch_only():
    for file in modules("hfprune_dist"):
        assert "submitit" not in {name.split(".")[0] for name in imports_of(file)}, file


@pytest.mark.parametrize(
    "module",
    [f"hfprune_dist.{name}" for name in TORCH_FREE] + ["launch.run_sweep", "launch.report", "launch.sweep_folder"],
)
def test_the_login_node_never_waits_for_torch(module):
    script = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'deepspeed'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
