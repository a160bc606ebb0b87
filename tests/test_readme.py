"""What READMEs and examples show exists, links and configurations too; every command runs, from a fresh clone."""

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hfprune_launch.hfprune import COMMANDS
from hfprune_launch.project import PROJECT
from hfprune_launch.slurm.profile import load_profile
from hfprune_launch.sweep import overrides_of

from hfprune_dist.config.load import load_config
from hfprune_dist.errors import UserError
from hfprune_dist.planning.methods import resolve_methods

ROOT = Path(__file__).resolve().parents[1]
TOP = ["hfprune_dist", "launch", "configs", "slurm", "tests"]
READMES = sorted([ROOT / "README.md", *(file for top in TOP for file in (ROOT / top).rglob("README.md"))])
MODULES = ["hfprune", *(name.replace("-", "_") for name in COMMANDS)]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def names(readme):
    return str(readme.relative_to(ROOT))


@pytest.fixture(scope="module")
def parsers():
    """Return each command's parser, captured where the command is about to use it."""
    found = []

    def hand_over(parser, *_):
        found.append(parser)
        sys.exit()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", hand_over)
        for command in MODULES:
            patch.setattr(sys, "argv", [command])
            with pytest.raises(SystemExit):
                importlib.import_module(f"hfprune_launch.{command}").main()
    return dict(zip(MODULES, found, strict=True))


# Contents of a README. Each function below yields the problems of a text that lies in a folder.


def blocks_of(text, language):
    return [body for kind, body in FENCE.findall(text) if kind == language]


def slug(heading):
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def wrong_links(text, folder):
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else None
        if file is not None and not file.exists():
            yield f"link to {target}"
        elif anchor:
            linked = text if file is None else file.read_text()
            headings = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", linked), re.MULTILINE)
            if anchor not in map(slug, headings):
                yield f"link to {target}: no such heading"


def commands_of(text):
    """Yield (command, its arguments) for every call of a command in a block of shell lines, by its path or hfprune."""
    for body in blocks_of(text, "bash"):
        for line in body.replace("\\\n", " ").replace("$seed", "0").splitlines():
            words = shlex.split(line.split(" > ")[0], comments=True)
            found = [place for place, word in enumerate(words) if re.fullmatch(r"launch/\w+\.py", word)]
            if found:
                arguments = words[found[0] + 1 :]
                yield words[found[0]].removeprefix("launch/").removesuffix(".py"), arguments
            elif words[:1] == ["hfprune"]:
                place = 0 if words[1].startswith("-") else 1
                yield words[place].replace("-", "_"), words[place + 1 :]


def wrong_commands(text, _folder, parsers):
    for command, arguments in commands_of(text):
        shown = f"{command}.py {' '.join(arguments)}"
        if command not in parsers:
            yield f"{shown}: no such command"
            continue
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                parsed = parsers[command].parse_args(arguments)
            if command == "sweep":
                _check_sweep(parsed)
        except (SystemExit, UserError) as error:
            yield f"{shown}: {complaint.getvalue() or error}"


def _check_sweep(parsed):
    """Check a sweep's command line as far as that is possible without the user's own files."""
    files = [ROOT / file for file in parsed.config if (ROOT / file).exists() or file.parts[0] in TOP]
    _check_config(load_config(files, overrides_of(parsed)))
    if parsed.profile is not None and (not parsed.profile.endswith(".yaml") or parsed.profile.startswith("slurm/")):
        load_profile(parsed.profile, PROJECT.profiles)


def _check_config(config):
    resolve_methods(config, ROOT / "configs" / "methods")
    aliases = {*config.aliases, *(file.stem for file in (ROOT / "configs" / "models").glob("*.yaml"))}
    for model in config.models:
        if "/" not in model and model not in aliases:
            raise UserError(f"no model {model!r}")


def wrong_yaml(text, folder, scratch):
    for number, body in enumerate(blocks_of(text, "yaml")):
        file = scratch / f"{number}.yaml"
        file.write_text(body)
        try:
            if folder.name == "slurm":
                load_profile(str(file), PROJECT.profiles)
            elif re.search("^criterion:", body, re.MULTILINE):
                _check_config(load_config([], {"methods": [str(file)]}))
            else:
                _check_config(load_config([file], {}))
        except UserError as error:
            yield f"{error}"


@pytest.mark.parametrize("readme", READMES, ids=names)
def test_what_a_readme_shows_exists(readme, parsers, tmp_path):
    text, folder = readme.read_text(), readme.parent
    commands, yaml = wrong_commands(text, folder, parsers), wrong_yaml(text, folder, tmp_path)
    assert [*wrong_links(text, folder), *commands, *yaml] == []


# A stranger's session: each command of all READMEs, in a clone without a cache, with tiny files in the demo's places.
# A command that isn't named here runs as it is.
LEFT_OUT = {
    r"bash (launch/quickstart|tests/run)\.sh": "installs from PyPI; quickstart: test_scripts.py",
    r"python launch/demo_assets\.py": "takes minutes: test_demo_assets.py",
    r"pip ": "needs PyPI; the wheel: launch/test_wheel.py",
    r"hf ": "needs the hub",
    r"slurm/cluster\.sh|.*--profile local-cluster": "needs root: slurm",
    r".*paper\.yaml --status": "follows a submission: slurm",
    r".*efficiency\.engine=vllm": "needs vLLM: stages/test_efficiency.py",
    r"python launch/compare\.py": "needs hours of sweeps: results/test_comparison.py",
}
DRY = r"sweep\b.*(paper\.yaml|runs/rivals|fidelity\.yaml|Qwen/)"  # needs hours, GPUs, a cluster or the hub
LITTLE = " --set prune.effort=quick --set calibration.samples=4 --set calibration.sequence_length=64"  # for prune
LITTLE += " --set evaluation.fidelity.windows=2 --set evaluation.fidelity.sequence_length=64"


def shown_commands():
    """Return each line of all READMEs' shell blocks once, in a reader's order; loops as their first round."""
    readers_order = sorted(READMES, key=lambda readme: (readme.parent != ROOT, readme.parent != ROOT / "launch"))
    bodies = [body for readme in readers_order for body in blocks_of(readme.read_text(), "bash")]
    joined = "".join(bodies).replace("\\\n", " ").replace("$seed", "0")
    lines = [re.split(r"(?:^|\s+)#", line.strip())[0] for line in joined.splitlines()]
    commands = [" ".join(line.split()) for line in lines if not re.fullmatch(r"for \w+ in .*; do|done|", line)]
    return list(dict.fromkeys(commands))


def is_left_out(command):
    return any(re.match(pattern, command) for pattern in LEFT_OUT)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone as git has it, with an environment of its own, and what its READMEs say that the reader brings."""
    from evaluations import CHOICE, write_task  # torch takes seconds to import
    from tiny import save_tiny, tiny_text, write_documents, write_pairs

    clone = tmp_path_factory.mktemp("stranger") / "clone"
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    (packages,) = (clone / ".venv" / "lib").glob("python*/site-packages")
    (packages / "hfprune_launch").symlink_to(clone / "launch")
    (packages / "clone.pth").write_text(f"{clone}\n{Path(yaml.__file__).parents[1]}\n")
    program = clone / ".venv" / "bin" / "hfprune"
    starts = "from hfprune_launch.hfprune import main\n\nraise SystemExit(main())"
    program.write_text(f"#!{program.with_name('python')}\n{starts}\n")
    program.chmod(0o755)

    assets = clone / "runs" / "demo-assets"
    for name, variant in (("llama", "llama"), ("qwen", "qwen2")):
        save_tiny(assets / name, variant, num_hidden_layers=4, intermediate_size=192, max_position_embeddings=1024)
    for seed, part in enumerate(("text/calibration", "text/heldout", "papers/calibration", "papers/heldout")):
        (assets / part).parent.mkdir(exist_ok=True)
        write_documents((assets / part).with_suffix(".jsonl"), count=40, words=100, seed=seed)
    write_pairs(assets / "instructions.jsonl")
    (assets / "tasks").mkdir()
    choices = [{"text": "ban der", "choices": ["kin", "gos t"], "label": 1}] * 4
    for name in ("demo_continuation", "demo_docstring"):
        write_task(assets / "tasks", name, choices, **CHOICE)
    for file in ("notes.txt", "TEXT.jsonl", "OTHER.jsonl"):
        (clone / file).write_text(f'{{"text": "{tiny_text(600, seed=0)}"}}\n')
    for readme in READMES:
        for body in blocks_of(readme.read_text(), "yaml"):
            name = re.match(r"# ([\w-]+\.yaml)|", body)[1]
            if name or "models:" in body:  # else it is a section for one that has them
                (clone / (name or "my.yaml")).write_text(body)
    for config in (clone / "my.yaml", clone / "configs" / "demo.yaml"):  # tokens are bytes here
        config.write_text(config.read_text().replace("sequence_length: 128", "sequence_length: 320"))
    return clone


def run_as_shown(clone, command, language="bash"):
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HFPRUNE_", "PYTHON"))}
    bare = {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{clone}/../hub", "XDG_CACHE_HOME": f"{clone}/../cache"}
    bare |= {"PATH": f"{clone}/.venv/bin:{usual['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    ended = subprocess.run([language, "-c", command], cwd=clone, env=usual | bare, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}"


def test_sweeps_that_readmes_show_can_be_planned_from_a_fresh_clone(clone):
    left_out = [pattern for pattern in LEFT_OUT if not any(re.match(pattern, command) for command in shown_commands())]
    assert left_out == [], "shown no longer"
    run_as_shown(clone, "cp slurm/profiles/example-gpu.yaml mine.yaml")
    for command in shown_commands():
        if re.search(DRY, command) and not is_left_out(command):
            run_as_shown(clone, f"{command.removesuffix('--dry-run')} --dry-run")


@pytest.mark.slow
@pytest.mark.thorough
def test_every_command_that_a_readme_shows_runs_in_a_fresh_clone(clone):
    for command in shown_commands():
        little = LITTLE if re.search(r"(launch/|hfprune )prune", command) else ""
        if not is_left_out(command) and not re.search(DRY, command):
            run_as_shown(clone, command + little)
    for readme in READMES:
        for body in blocks_of(readme.read_text(), "py"):
            run_as_shown(clone, body, "python")
