"""lm-eval's index of tasks, and what it tells of tasks before any is loaded."""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError, did_you_mean

_PLAIN_TASK = re.compile(r"^task:[ \t]*[\"']?([^\s\"'#]+)[\"']?[ \t]*$", re.MULTILINE)
# Options for the most tokens that an answer may have: lm-eval takes the first that is given, or its own number.
_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_USUAL_MOST = 256
# Keys of tasks that lm-eval refuses to evaluate without more than a language model, what they need, and the values
# with which they don't.
_UNSUITED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "unsafe_code": ("runs code that the model writes", (False,)),
    "doc_to_image": ("shows images to the model", (None,)),
    "doc_to_audio": ("plays sounds to the model", (None, False, "")),
}


def open_index(tasks: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's ``TaskManager``, which knows at least these tasks if they exist.

    All of lm-eval's own 14,000 files take it 12 s. Unless groups or tags are asked for, only those in the folders of
    the tasks are read.
    """
    return _open_index(tuple(tasks), include_path)


@cache  # asked again for each model
def _open_index(tasks: tuple[str, ...], include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    own = [include_path] if include_path else []
    known = TaskManager(include_path=own, include_defaults=False).task_index
    plain = {name for name, entry in known.items() if entry.kind in (Kind.TASK, Kind.PY_TASK)}
    folders = [_shipped_folders().get(name, set()) for name in set(tasks) - plain] if set(tasks) - plain else []
    if all(folders) and not (set(tasks) & known.keys()) - plain:
        return TaskManager(include_path=[*sorted(set().union(*folders)), *own], include_defaults=False)
    return TaskManager(include_path=own)


@cache
def _shipped_folders() -> Mapping[str, set[Path]]:
    """Plain tasks of lm-eval -> the folders of their definitions, found without parsing (0.6 s)."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    found: dict[str, set[Path]] = defaultdict(set)
    for file in (Path(spec.submodule_search_locations[0]) / "tasks").glob("**/*.yaml"):
        for name in _PLAIN_TASK.findall(file.read_text(encoding="utf-8", errors="replace")):
            found[name].add(file.parent)
    return dict(found)


def refuse_unknown(known: Mapping[str, Any], tasks: Sequence[str], include_path: Path | None) -> None:
    """Refuse names that lm-eval doesn't know, also where groups list them, and tasks that need more than a model.

    Raises:
        UserError: listing all unknown names with close matches, if any; or naming what a task needs.
    """
    wanted = dict.fromkeys(tasks, "") | _listed(known, tasks)
    unknown = [
        f"unknown task {name!r}{place}{did_you_mean(name, known)}"
        for name, place in wanted.items()
        if name not in known
    ]
    if unknown:
        unknown += _unreadable(known, include_path) if include_path else []
        where = f" and {include_path}" if include_path else " (evaluation.include_path names a folder with more)"
        raise UserError("evaluation.tasks:\n  " + "\n  ".join(unknown) + f"\nknown are the tasks of lm-eval{where}")
    for task in tasks:
        for entry in members_of(known, task):
            for key, (needs, without) in _UNSUITED.items():
                if key in entry.cfg and entry.cfg[key] not in without:
                    raise UserError(f"evaluation.tasks: {task!r} ({entry.yaml_path}) {needs}, which isn't done here")


def generating_tasks(tasks: Sequence[str], include_path: Path | None) -> list[str]:
    """The names of tasks, groups and tags that are, or include, a task in which the model writes its answer.

    A task that is defined by a Python class doesn't count: what it does is not known.
    """
    known = open_index(tasks, include_path).task_index
    return [task for task in tasks if any(_generates(entry.cfg) for entry in members_of(known, task))]


def require_room_for_answers(tasks: Sequence[str], include_path: Path | None, positions: int, model: Path) -> None:
    """Refuse tasks whose answers may be as long as all that a model reads, which leaves no room for a prompt.

    Args:
        positions: the most tokens that the model reads.
        model: its folder, for messages.

    Raises:
        UserError: naming the first such task, and both numbers.
    """
    known = open_index(tasks, include_path).task_index
    for entry in (entry for task in tasks for entry in members_of(known, task)):
        tokens = _most_tokens(entry.cfg) if _generates(entry.cfg) else 0
        if tokens >= positions:
            raise UserError(
                f"evaluation.tasks: answers of {entry.name!r} ({entry.yaml_path}) may have {tokens} tokens "
                f"(generation_kwargs), but the model in {model} reads {positions}, prompt included; leave the "
                "task out, or evaluate one of your own with a smaller max_gen_toks"
            )


def explain(error: Exception) -> str:
    """Describe an error raised by a library in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def _unreadable(known: Mapping[str, Any], include_path: Path) -> list[str]:
    """The user's files that lm-eval passes over, and why."""
    from lm_eval.tasks._yaml_loader import load_yaml

    told, read = [], {entry.yaml_path for entry in known.values()}
    for file in sorted({*include_path.glob("**/*.yaml")} - read):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            told.append(f"{file}: can't be read: {explain(error)}")
    return told


def _listed(known: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, str]:
    """Names that groups list without settings, which can't define them -> where."""
    wanted, listed = list(tasks), dict[str, str]()
    for name in wanted:  # grows while groups unfold
        if (group := known.get(name)) and group.cfg and "group" in group.cfg:
            members = group.cfg.get("task") or []
            listed |= {member: f" (listed in {group.yaml_path})" for member in members if isinstance(member, str)}
            wanted += [member for member in _names_in(members) if member not in wanted]
    return listed


def members_of(known: Mapping[str, Any], name: str) -> Iterator[Any]:
    """Yield the entry of a task, or those of all tasks of a group or tag, as far as they are known by their names."""
    wanted = [name]
    for each in wanted:  # grows while groups unfold
        entry = known.get(each)
        if entry is None:
            continue
        if entry.cfg is None:  # a tag
            wanted += [member for member in sorted(entry.tags) if member not in wanted]
        elif "group" in entry.cfg:
            listed = _names_in(entry.cfg.get("task"))
            wanted += [member for member in dict.fromkeys(listed) if member not in wanted]
        else:
            yield entry


def _names_in(members: Any) -> Iterator[str]:
    for member in members if isinstance(members, list) else ():
        if not isinstance(member, Mapping):
            yield str(member)
        elif isinstance(member.get("task"), list):
            yield from _names_in(member["task"])
        else:
            yield str(member.get("group", member.get("task")))


def _generates(settings: Mapping[str, Any]) -> bool:
    # The default of lm_eval.config.task.TaskConfig.
    return "class" not in settings and settings.get("output_type", "generate_until") == "generate_until"


def _most_tokens(settings: Mapping[str, Any]) -> int:
    options = settings.get("generation_kwargs")
    given = [options[key] for key in _MOST_TOKENS if options.get(key) is not None] if isinstance(options, dict) else []
    most = given[0] if given else _USUAL_MOST
    return most if isinstance(most, int) else 0
