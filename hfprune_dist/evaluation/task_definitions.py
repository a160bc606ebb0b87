"""Definitions in YAML files of lm-eval tasks, found without lm-eval, which parses its own 14,000 for that (12 s).

Their text is searched for names (0.6 s), and only the few files that are needed are parsed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hfprune_dist.errors import UserError

DEFINITION = re.compile(r"^(task|group|tag):[ \t]*[\"']?([^\s\"'#]+)[\"']?[ \t]*$", re.MULTILINE)
# The default output type of a task; see ``lm_eval.config.task.TaskConfig``.
GENERATES = "generate_until"
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


@dataclass(frozen=True)
class Definition:
    """A name that lm-eval understands, and the YAML file that defines it.

    Attributes:
        kind: task, group, or tag (a name for all tasks that carry it).
        members: names that a group lists, if they are known.
    """

    kind: str
    file: Path
    members: tuple[str, ...] = ()


def generating_tasks(tasks: Sequence[str], include_path: Path | None) -> list[str]:
    """The names of tasks, groups and tags that are, or include, a task in which the model writes its answer.

    A task that is defined by a Python class, or whose file can't be read, doesn't count: what it does is not known.
    """
    own, _ = own_definitions(include_path)
    known = _known(tasks, own)
    return [task for task in tasks if any(_generates(it) for it in _tasks_of(task, known))]


def _known(tasks: Sequence[str], own: Mapping[str, Definition]) -> dict[str, Definition]:
    """The user's own definitions, with lm-eval's if these tasks need any of them."""
    return {**(shipped_definitions() if set(tasks) - set(own) else {}), **own}


def _tasks_of(name: str, known: Mapping[str, Definition]) -> Iterator[Definition]:
    """Yield a task, the tasks of a group and of groups in it, or the first task with a tag, as far as known."""
    wanted = [name]
    for each in wanted:  # grows while groups unfold
        definition = known.get(each)
        if definition is not None and definition.kind == "group":
            members = definition.members or _members_in(definition)
            wanted += [member for member in dict.fromkeys(members) if member not in wanted]
        elif definition is not None:
            yield definition


def _members_in(group: Definition) -> tuple[str, ...]:
    """Members of a group, read from its file, if only its name has been looked up so far."""
    found: dict[str, Definition] = {}
    content = _read_yaml(group.file)
    if isinstance(content, dict):
        _define(content, group.file, found)
    return next((it.members for it in found.values() if it.kind == "group"), ())


def _generates(task: Definition) -> bool:
    content = _content_of(task)
    return content is not None and "class" not in content and content.get("output_type", GENERATES) == GENERATES


def require_room_for_answers(tasks: Sequence[str], include_path: Path | None, positions: int, model: Path) -> None:
    """Refuse tasks whose answers may be as long as all that a model reads, which leaves no room for a prompt.

    Of members of groups, which may have settings for them, a stage finds out.

    Args:
        positions: the most tokens that the model reads.
        model: its folder, for messages.

    Raises:
        UserError: naming the first such task, and both numbers.
    """
    own, _ = own_definitions(include_path)
    known = _known(tasks, own)
    for task in tasks:
        definition = known.get(task)
        if definition is not None and definition.kind == "task" and _generates(definition):
            tokens = _most_tokens(_content_of(definition) or {})
            if tokens >= positions:
                raise UserError(
                    f"evaluation.tasks: answers of {task!r} ({definition.file}) may have {tokens} tokens "
                    f"(generation_kwargs), but the model in {model} reads {positions}, prompt included; leave the "
                    "task out, or evaluate one of your own with a smaller max_gen_toks"
                )


def _most_tokens(content: Mapping[str, Any]) -> int:
    """The most tokens that an answer may have; 0 if the task's file has no number there."""
    options = content.get("generation_kwargs")
    given = [options[key] for key in _MOST_TOKENS if options.get(key) is not None] if isinstance(options, dict) else []
    most = given[0] if given else _USUAL_MOST
    return most if isinstance(most, int) else 0


def _content_of(task: Definition) -> dict[str, Any] | None:
    """Content of a task's YAML file and of those that it includes; None if it can't be read."""
    try:
        return with_included(task.file)
    except (UserError, yaml.YAMLError, OSError, ValueError):
        return None


def refuse_unsuited(tasks: Sequence[str], known: Mapping[str, Definition]) -> None:
    """Refuse tasks that lm-eval wouldn't evaluate: only when a model has been made, it says so.

    Raises:
        UserError: naming the first of them, and what it needs.
    """
    for task in tasks:
        for definition in _tasks_of(task, known):
            content = _content_of(definition) or {}
            for key, (needs, without) in _UNSUITED.items():
                if key in content and content[key] not in without:
                    raise UserError(f"evaluation.tasks: {task!r} ({definition.file}) {needs}, which isn't done here")


def refuse_renamed(tasks: Sequence[str], known: Mapping[str, Definition]) -> None:
    """Refuse groups in which lm-eval gives several tasks one name, of which only the last would be scored.

    It does where a group lists another group, or a tag, with settings (``{task: mmlu, num_fewshot: 5}``), and hands
    these down to each task in there, the name among them.

    Raises:
        UserError: naming the first such group, and what to evaluate in its place.
    """
    wanted = list(tasks)
    for name in wanted:  # grows while groups unfold
        if name not in known or known[name].kind != "group":
            continue
        members = _listed(known[name])
        if renamed := list(_renamed(members, known)):
            raise UserError(
                f"evaluation.tasks: in group {name!r} ({known[name].file}), lm-eval gives all tasks of "
                f"{' and of '.join(renamed)} one name, so that only the last is scored; "
                f"name the members in place of the group: {', '.join(_names_in(members))}"
            )
        wanted += [member for member in dict.fromkeys(_names_in(members)) if member not in wanted]


def refuse_hollow(tasks: Sequence[str], own: Mapping[str, Definition]) -> None:
    """Refuse groups of the user's own without members, of which lm-eval would score nothing, and groups that are
    members of themselves.

    Raises:
        UserError: naming the first of them.
    """
    for name in unfolded(tasks, own):
        if name in own and own[name].kind == "group":
            where = f"evaluation.tasks: group {name!r} ({own[name].file})"
            if not _listed(own[name]):
                raise UserError(f"{where} has no members; name them in a list under task, e.g. task: [arc_easy]")
            if name in unfolded(own[name].members, own):
                raise UserError(f"{where} is a member of itself; take it out of its own list, or rename it")


def plain_members(tasks: Sequence[str], own: Mapping[str, Definition]) -> dict[str, str]:
    """Names that groups of the user's own list without settings -> the group's file. They must be defined elsewhere;
    a member with settings may be defined by these.
    """
    groups = [own[name] for name in unfolded(tasks, own) if name in own and own[name].kind == "group"]
    return {member: str(group.file) for group in groups for member in _plain_in(_listed(group))}


def _plain_in(members: Sequence[Any]) -> Iterator[str]:
    for member in members:
        if not isinstance(member, Mapping):
            yield str(member)
        elif isinstance(member.get("task"), list):
            yield from _plain_in(member["task"])


def _listed(group: Definition) -> list[Any]:
    members = with_included(group.file).get("task")
    return members if isinstance(members, list) else []


def _names_in(members: Sequence[Any]) -> Iterator[str]:
    """Yield the names that a group's members refer to; those in an inline group in its place."""
    for member in members:
        if isinstance(member, Mapping) and isinstance(member.get("task"), list):
            yield from _names_in(member["task"])
        else:
            yield str(member.get("group", member.get("task")) if isinstance(member, Mapping) else member)


def _renamed(members: Sequence[Any], known: Mapping[str, Definition]) -> Iterator[str]:
    """Yield the groups and tags among a group's members whose tasks lose their names."""
    for member in members:
        if isinstance(member, Mapping) and isinstance(member.get("task"), list):
            yield from _renamed(member["task"], known)
        elif _is_with_settings(member) and (definition := known.get(str(member["task"]))) is not None:
            is_named_inside = all(_is_with_settings(inner) for inner in _listed(definition))
            if definition.kind == "tag" or (definition.kind == "group" and not is_named_inside):
                yield str(member["task"])


def _is_with_settings(member: Any) -> bool:
    return isinstance(member, Mapping) and "task" in member and "group" not in member


def explain(error: Exception) -> str:
    """Describe an error raised by a library in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def unfolded(tasks: Sequence[str], own: Mapping[str, Definition]) -> list[str]:
    """The tasks, followed by the members of those that are groups of the user's own, recursively."""
    wanted = list(tasks)
    for name in wanted:  # grows while groups unfold
        members = own[name].members if name in own else ()
        wanted += [member for member in dict.fromkeys(members) if member not in wanted]
    return wanted


@cache
def shipped_definitions() -> Mapping[str, Definition]:
    """Names in lm-eval's own YAML files, found without parsing; tags in lists and inherited names are missed.

    The thousands of files are read once: checks of each model ask again.
    """
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    found: dict[str, Definition] = {}
    # In lm-eval's own order, in which the first definition of a name counts.
    for file in sorted((Path(spec.submodule_search_locations[0]) / "tasks").glob("**/*.yaml"), key=Path.as_posix):
        for kind, name in DEFINITION.findall(file.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, Definition(kind, file))
    return found


def own_definitions(folder: Path | None) -> tuple[dict[str, Definition], dict[Path, str]]:
    """Definitions in the user's YAML files, and the files that can't be read, with the reason for each."""
    found: dict[str, Definition] = {}
    unreadable: dict[Path, str] = {}
    for file in sorted(folder.glob("**/*.yaml")) if folder else ():
        try:
            content = _read_yaml(file)
        except (yaml.YAMLError, OSError, ValueError) as error:  # ValueError: not UTF-8; an invalid date
            unreadable[file] = explain(error)
            continue
        if isinstance(content, dict):
            tags = content.get("tag")
            if tags is None or isinstance(tags, str | list):
                _define(content, file, found)
            else:  # lm-eval skips the file
                unreadable[file] = f"tag must be a name, or a list of names, not {tags!r}"
    return found, unreadable


def _read_yaml(file: Path) -> Any:
    return yaml.load(file.read_text(encoding="utf-8"), _TaskYaml)


def with_included(file: Path) -> dict[str, Any]:
    """Content of a task's YAML file, merged with the files that it includes, as lm-eval reads it.

    Raises:
        UserError: if an included file is missing or can't be read, or ``include`` names no files.
    """
    return merged_with_included(file)[0]


def merged_with_included(file: Path) -> tuple[dict[str, Any], list[Path]]:
    """Content as ``with_included`` returns it, and the files that it comes from: this one, and all that are included.

    Raises:
        UserError: if an included file is missing or can't be read, or ``include`` names no files.
    """
    content = dict(_read_yaml(file))
    included = content.pop("include", None) or []
    if not isinstance(included, str | list):
        raise UserError(f"{file}: include must be the name of a file, or a list of names, not {included!r}")
    merged: dict[str, Any] = {}
    sources = [file]
    for other in [included] if isinstance(included, str) else included:
        try:
            # Of a link, lm-eval takes the folder of the file that it leads to.
            below, its_sources = merged_with_included(file.resolve().parent / other)
        except FileNotFoundError:
            raise UserError(f"{file}: includes {other}, which is missing") from None
        except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: includes {other}, which can't be read: {explain(error)}") from None
        merged |= below
        sources += its_sources
    return merged | content, sources


def _define(content: Mapping[str, Any], file: Path, found: dict[str, Definition]) -> None:
    if isinstance(content.get("group"), str):
        members = content.get("task")
        names = [_name_of(member) for member in members] if isinstance(members, list) else []
        found.setdefault(content["group"], Definition("group", file, tuple(names)))
    elif isinstance(content.get("task"), str):
        found.setdefault(content["task"], Definition("task", file))
        tags = content.get("tag") or []
        for tag in [tags] if isinstance(tags, str) else tags:
            found.setdefault(str(tag), Definition("tag", file))


def _name_of(member: Any) -> str:
    """Name that an entry of a group refers to; for an inline group its text, which is the name of no definition."""
    return str(member.get("task") if isinstance(member, Mapping) and "group" not in member else member)


class _TaskYaml(yaml.SafeLoader):
    """YAML loader that keeps lm-eval's ``!function module.name`` as text, without importing anything."""


_TaskYaml.add_multi_constructor("!function", lambda loader, suffix, node: f"!function {node.value}")
