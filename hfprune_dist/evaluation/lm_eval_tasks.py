"""lm-eval's tasks: checking their names, loading them fast, and selecting the results to keep.

lm-eval ships 14,000 YAML files, and its own index parses all of them (12 s). Here their text is searched for the wanted
names (0.6 s), and only the folders that define them are indexed, if that is sure to give the same tasks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.evaluation.examples import require_examples
from hfprune_dist.evaluation.task_definitions import (
    Definition,
    explain,
    own_definitions,
    plain_members,
    refuse_hollow,
    refuse_renamed,
    refuse_unsuited,
    shipped_definitions,
    unfolded,
    with_included,
)
from hfprune_dist.evaluation.task_files import FILE_LOADERS, data_folder, matching, paths_in
from hfprune_dist.store.hashing import digest_of

# The library names a lock after the whole path of what it locks, and shortens names of more characters than a file's
# name has bytes. A character of UTF-8 takes up to four.
LONGEST_LOCK_NAME = 255 // 4


def check_tasks(tasks: Sequence[str], include_path: Path | None) -> None:
    """Refuse task names that lm-eval doesn't know, and tasks of the user's own that can't be used.

    Raises:
        UserError: for unknown names, also in groups, listing all of them with close matches, if any; for an
            ``include_path`` without tasks; for a group without members, or of which lm-eval would score only some
            tasks; for tasks that run code or need images; for a missing or empty file that one of the user's own tasks
            reads, naming it.
    """
    own, unreadable = own_definitions(include_path)
    if include_path is not None and not (own or unreadable):
        raise UserError(f"evaluation.include_path: no task is defined in {include_path}/**/*.yaml")
    refuse_hollow(tasks, own)
    shipped = shipped_definitions() if set(unfolded(tasks, own)) - set(own) else {}
    known = {**shipped, **own}
    members = {name: f" (listed in {file})" for name, file in plain_members(tasks, own).items()}
    wanted = members | dict.fromkeys(tasks, "")
    unknown = {name: where for name, where in wanted.items() if name not in known}
    _refuse_unknown(unknown, include_path, own, unreadable)
    refuse_renamed(tasks, known)
    refuse_unsuited(tasks, known)
    for name in unfolded(tasks, own):
        if name in own and own[name].kind != "group":
            assert include_path is not None
            _check_data(name, own[name].file, include_path)


def _refuse_unknown(
    tasks: Mapping[str, str], include_path: Path | None, own: Mapping[str, Definition], unreadable: Mapping[Path, str]
) -> None:
    """Refuse names that only lm-eval's index may know, if it doesn't.

    Args:
        tasks: each name -> where it is from, for messages.
    """
    if not tasks:
        return
    known = set(own) | set(_open_index(None, include_path).task_index)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        lines = [f"unknown task {task!r}{tasks[task]}{did_you_mean(task, known)}" for task in unknown]
        lines += [f"{file}: can't be read: {reason}" for file, reason in unreadable.items()]
        where = f" and {include_path}" if include_path else " (evaluation.include_path names a folder with more)"
        raise UserError("evaluation.tasks:\n  " + "\n  ".join(lines) + f"\nknown are the tasks of lm-eval{where}")


class TaskLoader:
    """Turns task names into lm-eval's task objects.

    Args:
        tasks: all names that will be loaded.
        include_path: folder with the user's YAML files; relative paths of data in them are relative to this folder.
        cache: folder for what the datasets library builds from local files.
    """

    def __init__(self, tasks: Sequence[str], include_path: Path | None, cache: Path) -> None:
        _silence()
        include_path = include_path and include_path.resolve()
        own, _ = own_definitions(include_path)
        self._index = _open_index(_folders_of(tasks, own), include_path)
        self._include_path = include_path
        self._cache = cache.resolve()

    def load(self, name: str, num_fewshot: int | None) -> Any:
        """Load a task, or all tasks of a group or tag, with their data.

        Returns:
            tasks in the form that ``lm_eval.evaluator.evaluate`` takes.

        Raises:
            UserError: if its YAML file or its data can't be loaded, or it has too few documents for that many
                examples; the message names the task and the reason.
        """
        try:
            with self._own_folder(), self._own_cache(name):
                loaded = self._index.load(name)
            for task in loaded["tasks"].values():
                _set_fewshot(task, num_fewshot)
        except Exception as error:  # a task is third-party code and data: anything can happen
            raise UserError(f"task {name!r} can't be loaded: {explain(error)}") from error
        for member, task in loaded["tasks"].items():
            require_examples(member, task)
        return loaded

    def _own_folder(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.chdir(self._include_path) if self._include_path else contextlib.nullcontext()

    @contextlib.contextmanager
    def _own_cache(self, name: str) -> Iterator[None]:
        """Keep what is built from local files out of the user's cache of downloaded data sets.

        Names of locks are shortened by a hash that each process computes differently, so this is for our own cache,
        which a single process uses.
        """
        import datasets

        usual, lock = datasets.config.HF_DATASETS_CACHE, datasets.builder.FileLock
        longest = lock.MAX_FILENAME_LENGTH
        entry = self._index.task_index.get(name)
        if entry is not None and (entry.cfg or {}).get("dataset_path") in FILE_LOADERS:
            datasets.config.HF_DATASETS_CACHE, lock.MAX_FILENAME_LENGTH = self._cache, LONGEST_LOCK_NAME
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE, lock.MAX_FILENAME_LENGTH = usual, longest


def plain(value: Any) -> Any:
    """Convert anything that lm-eval returns to a JSON value: functions become names, non-finite numbers null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # a number or an array of numpy or torch
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return getattr(value, "__qualname__", None) or str(value)


def scores_of(name: str, result: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The scores of a task or group under its name; if it has none of its own (a tag, a group that doesn't aggregate),
    those of its members. Members of a member that has scores are left out: averages would count them twice.

    Args:
        result: result of ``lm_eval.evaluator.evaluate`` for ``name``, converted by ``plain``.
    """
    cleaned = {member: clean_metrics(metrics) for member, metrics in result["results"].items()}
    wanted = [name] if name in cleaned else list(cleaned)
    for each in wanted:  # grows while groups without scores unfold
        members = [] if cleaned.get(each) else result["group_subtasks"].get(each, [])
        wanted += [member for member in members if member not in wanted]
    return {each: cleaned[each] for each in wanted if cleaned.get(each)}


def clean_metrics(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Rename lm-eval's ``metric,filter`` keys: ``acc,none`` to ``acc``, ``f1,strict`` to ``f1[strict]``.

    A standard error keeps its suffix at the end (``f1[strict]_stderr``) and is None where lm-eval has none.
    """
    cleaned: dict[str, float | None] = {}
    for key, value in metrics.items():
        metric, separator, filter_name = key.partition(",")
        if separator:
            base = metric.removesuffix("_stderr")
            suffix = metric[len(base) :]
            readable = base + ("" if filter_name == "none" else f"[{filter_name}]") + suffix
            cleaned[readable] = value if isinstance(value, int | float) else None
    return cleaned


def details_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval reports about a task, with its configuration reduced to a hash."""
    kept = ("results", "groups", "group_subtasks", "n-samples", "n-shot", "versions", "higher_is_better")
    hashes = {task: digest_of(config)[:16] for task, config in result["configs"].items()}
    return {key: result[key] for key in kept if key in result} | {"config_hashes": hashes}


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples as lm-eval's command line does: a task set to 0 stays at 0; sampling is seeded."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    usual = task.get_config("num_fewshot")
    if num_fewshot is None:
        task.set_config(key="num_fewshot", value=usual or 0)
    elif usual != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _silence() -> None:
    """Turn off progress bars and log output: progress has its own file, errors have their own messages."""
    import datasets
    import lm_eval.api.task

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    lm_eval.api.task.tqdm = lambda documents, **_: documents  # a bar without a switch


def _open_index(folders: Sequence[Path] | None, include_path: Path | None) -> Any:
    """lm-eval's index over some of its own folders (None: all of them) and the user's folder."""
    from lm_eval.tasks import TaskManager

    paths = [*(folders or []), *([include_path] if include_path else [])]
    return TaskManager(include_path=paths, include_defaults=folders is None)


def _folders_of(tasks: Sequence[str], own: Mapping[str, Definition]) -> list[Path] | None:
    """lm-eval's folders that define what ``tasks`` need in addition to the user's; None if a full index is needed."""
    wanted = unfolded(tasks, own)
    if any(name in own and own[name].kind == "tag" for name in wanted):
        return None  # lm-eval's own tasks may carry the tag, too
    foreign = {name for name in wanted if name not in own}
    shipped = shipped_definitions() if foreign else {}
    if not all(name in shipped and shipped[name].kind == "task" for name in foreign):
        return None
    return sorted({shipped[name].file.parent for name in foreign})


def _check_data(name: str, file: Path, include_path: Path) -> None:
    """Refuse a task whose local data is missing or empty.

    Raises:
        UserError: if it is; the message names the task and the file.
    """
    content = with_included(file)
    options = content.get("dataset_kwargs")
    if content.get("dataset_path") not in FILE_LOADERS or not isinstance(options, Mapping):
        return
    place = data_folder(content, include_path)
    for pattern in paths_in(options.get("data_files")):
        if "://" in pattern:
            continue
        files = matching(place / pattern)
        if not files:
            raise UserError(f"task {name!r} ({file}): its data {pattern} is missing; it is looked for in {place}")
        if all(_is_blank(it) for it in files):
            raise UserError(f"task {name!r} ({file}): its data {pattern} is empty")


def _is_blank(file: Path) -> bool:
    with file.open("rb") as stream:
        return not stream.read(4096).strip()
