"""lm-eval's tasks: which there are, loading them with their data, and selecting the results to keep."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hfprune_dist.data.text import require_data_set
from hfprune_dist.errors import UserError, did_you_mean

# Loaders of the datasets library that read local files.
FILE_LOADERS = ("arrow", "csv", "json", "parquet", "text")
_PLAIN_TASK = re.compile(r"^task:[ \t]*[\"']?([^\s\"'#]+)[\"']?[ \t]*$", re.MULTILINE)


def check_tasks(tasks: Sequence[str], include_path: Path | None, *, data: bool = True) -> None:
    """Refuse tasks that lm-eval doesn't know, and plain ones that run code or, unless ``data`` is False, whose data are
    neither on the hub nor cached.
    """
    known = _open_index(tuple(tasks), include_path).task_index
    unknown = [f"unknown task {name!r}{did_you_mean(name, known)}" for name in tasks if name not in known]
    if unknown:
        where = f" and {include_path}" if include_path else " (evaluation.include_path names a folder with more)"
        raise UserError("evaluation.tasks:\n  " + "\n  ".join(unknown) + f"\nvalid: the tasks of lm-eval{where}")
    if unsafe := [name for name in tasks if (known[name].cfg or {}).get("unsafe_code")]:
        said = "they run code that a model writes, which isn't done here; leave them out"
        raise UserError(f"evaluation.tasks: {', '.join(unsafe)}: {said}")
    for name in tasks if data else ():
        settings = known[name].cfg or {}
        source, part = settings.get("dataset_path"), settings.get("dataset_name")
        if not source or source in FILE_LOADERS or ((include_path or Path()) / source).exists():
            continue
        try:
            require_data_set({"dataset": source, "name": part, "split": None, "revision": None})
        except UserError as error:
            raise UserError(
                f"evaluation.tasks: {name}: its data set {source!r} is not in the cache of data sets, and the hub "
                "lacks it or can't be reached; download it first, or leave the task out"
            ) from error


@cache  # asked again for each model
def _open_index(tasks: tuple[str, ...], include_path: Path | None) -> Any:
    """lm-eval's ``TaskManager``, which knows at least these tasks if they exist.

    All of lm-eval's own 14,000 files take it 12 s. Unless groups or tags are asked for, only those in the folders of
    the tasks are read.
    """
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


class TaskLoader:
    """Turns task names into lm-eval's task objects.

    Args:
        tasks: all names that will be loaded.
        include_path: folder with the user's YAML files; relative paths of data in them are relative to this folder.
        cache: folder for what the datasets library builds from local files.
    """

    def __init__(self, tasks: Sequence[str], include_path: Path | None, cache: Path) -> None:
        include_path = include_path and include_path.resolve()
        self._index = _open_index(tuple(tasks), include_path)
        self._include_path = include_path
        self._cache = cache.resolve()

    def load(self, name: str, num_fewshot: int | None) -> Any:
        """Load a task, or all of a group or tag, with data and so many examples in prompts (None: its own number)."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        entry = self._index.task_index.get(name)
        place = "" if entry is None or entry.yaml_path is None else f" ({entry.yaml_path})"
        try:
            with self._at_home(entry):
                loaded = self._index.load(name)
            for task in loaded["tasks"].values():
                # As lm-eval's command line does: a task set to 0 examples stays at 0; sampling is seeded.
                usual = task.get_config("num_fewshot")
                examples = usual or 0 if num_fewshot is None or usual == 0 else num_fewshot
                task.set_config(key="num_fewshot", value=examples)
                task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        except Exception as error:  # a task is third-party code and data: anything can happen
            raise UserError(f"task {name!r}{place} can't be loaded: {explain(error)}") from error
        return loaded

    @contextlib.contextmanager
    def _at_home(self, entry: Any) -> Iterator[None]:
        """Find data by relative paths, and keep what is built from local files out of the user's cache of data sets."""
        import datasets

        usual = datasets.config.HF_DATASETS_CACHE
        if entry is not None and (entry.cfg or {}).get("dataset_path") in FILE_LOADERS:
            datasets.config.HF_DATASETS_CACHE = self._cache
        try:
            with contextlib.chdir(self._include_path) if self._include_path else contextlib.nullcontext():
                yield
        finally:
            datasets.config.HF_DATASETS_CACHE = usual


def explain(error: Exception) -> str:
    """Describe an error raised by a library in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


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
    """The scores of a task or group under its name, from the result of ``lm_eval.evaluator.evaluate``, converted by
    ``plain``; if it has none of its own (a tag, a group that doesn't aggregate), those of its members. Members of a
    member that has scores are left out: averages would count them twice.
    """
    cleaned = {member: clean_metrics(metrics) for member, metrics in result["results"].items()}
    wanted = [name] if name in cleaned else list(cleaned)
    for each in wanted:  # grows while groups without scores unfold
        members = [] if cleaned.get(each) else result["group_subtasks"].get(each, [])
        wanted += [member for member in members if member not in wanted]
    return {each: cleaned[each] for each in wanted if cleaned.get(each)}


def clean_metrics(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Rename lm-eval's keys: ``acc,none`` to ``acc``, ``f1_stderr,strict`` to ``f1[strict]_stderr`` (None: unknown)."""
    cleaned: dict[str, float | None] = {}
    for key, value in metrics.items():
        metric, separator, filter_name = key.partition(",")
        if separator:
            base = metric.removesuffix("_stderr")
            suffix = metric[len(base) :]
            readable = base + ("" if filter_name == "none" else f"[{filter_name}]") + suffix
            cleaned[readable] = value if isinstance(value, int | float) else None
    return cleaned
