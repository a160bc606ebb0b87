"""What READMEs and examples show exists: links, commands, configurations."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from hfprune_launch.project import PROJECT
from hfprune_launch.slurm.profile import load_profile
from hfprune_launch.sweep import overrides_of

from hfprune_dist.config.load import load_config
from hfprune_dist.errors import UserError
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import shipped_aliases

ROOT = Path(__file__).resolve().parents[1]
TOP = ["hfprune_dist", "launch", "configs", "slurm", "tests"]
READMES = sorted([ROOT / "README.md", *(file for top in TOP for file in (ROOT / top).rglob("README.md"))])
COMMANDS = ["hfprune", "sweep", "prune", "report", "compare", "bench", "clean", "demo_assets", "schema"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def names(readme):
    return str(readme.relative_to(ROOT))


@pytest.fixture(scope="module")
def parsers():
    """Return each command's parser, captured where the command is about to use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", _hand_over)
        return {command: _parser_of(command, patch) for command in COMMANDS}


class HandedOver(Exception):  # noqa: N818
    pass


def _hand_over(parser, *_):
    raise HandedOver(parser)


def _parser_of(command, patch):
    patch.setattr(sys, "argv", [command])
    with pytest.raises(HandedOver) as caught:
        importlib.import_module(f"hfprune_launch.{command}").main()
    return caught.value.args[0]


# Contents of a README. Each function below yields the problems of a text that lies in a folder.


def prose_of(text):
    return FENCE.sub("", text)


def blocks_of(text, language):
    return [body for kind, body in FENCE.findall(text) if kind == language]


def slug(heading):
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def wrong_links(text, folder):
    for target in re.findall(r"\]\(([^)]+)\)", prose_of(text)):
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
    aliases = {**shipped_aliases(ROOT / "configs" / "models"), **config.aliases}
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


EXAMPLES = [
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "slurm" / "profiles").glob("*.yaml")),
    *(ROOT / "launch" / f"{command}.py" for command in COMMANDS),
    *(ROOT / "launch" / "quickstart.sh", ROOT / "launch" / "stage" / "run.py"),
]


@pytest.mark.parametrize("file", EXAMPLES, ids=names)
def test_commands_in_comments_and_help_texts_exist(file, parsers):
    """An example ends with its line, or before an explanation set apart from it; "..." stands for other options."""
    shown = file.read_text().replace("\\\n#", "").replace(" ...", "").replace(" | --cancel", "")
    lines = [re.split(r"   +", line)[0] for line in re.findall(r"python launch/[^`\n]*", shown)]
    assert list(wrong_commands("```bash\n" + "\n".join(lines) + "\n```", ROOT, parsers)) == []
