"""lm-eval's tasks: checking and loading them with their data, and selecting the results to keep."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.task_index import explain, members_of, open_index, refuse_unknown
from hfprune_dist.store.hashing import digest_of

# Loaders of the datasets library that read local files.
FILE_LOADERS = ("arrow", "csv", "json", "parquet", "text")
# The library names a lock after the whole path of what it locks, and shortens names of more characters than a file's
# name has bytes. A character of UTF-8 takes up to four.
LONGEST_LOCK_NAME = 255 // 4


def check_tasks(tasks: Sequence[str], include_path: Path | None, num_fewshot: int | None) -> None:
    """Refuse tasks that can't be evaluated, as far as that is known without a network: those of the user's own whose
    data is local are loaded.

    Args:
        num_fewshot: examples in prompts; None: each task's own number.

    Raises:
        UserError: for an ``include_path`` without tasks, and as ``refuse_unknown`` and ``TaskLoader.load``.
    """
    if include_path is not None and not any(include_path.glob("**/*.yaml")):
        raise UserError(f"evaluation.include_path: no task is defined in {include_path}/**/*.yaml")
    known = open_index(tasks, include_path).task_index
    refuse_unknown(known, tasks, include_path)
    local = [task for task in tasks if all(_is_local(entry, include_path) for entry in members_of(known, task))]
    if local:
        with tempfile.TemporaryDirectory() as cache:
            loader = TaskLoader(tasks, include_path, Path(cache))
            for task in local:
                loader.load(task, num_fewshot)


def _is_local(entry: Any, include_path: Path | None) -> bool:
    """Whether a task is the user's own, with data in files."""
    is_own = include_path is not None and entry.yaml_path.is_relative_to(include_path)
    has_files = entry.cfg.get("dataset_path") in FILE_LOADERS
    return is_own and has_files and "://" not in str(entry.cfg.get("dataset_kwargs"))


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
        self._index = open_index(tasks, include_path)
        self._include_path = include_path
        self._cache = cache.resolve()

    def load(self, name: str, num_fewshot: int | None) -> Any:
        """Load a task, or all tasks of a group or tag, with their data.

        Returns:
            tasks in the form that ``lm_eval.evaluator.evaluate`` takes.

        Raises:
            UserError: if its YAML file or its data can't be loaded, it has no tasks or lm-eval would score only some
                of them, or one has too few documents for that many examples; names the task and the reason.
        """
        try:
            with self._own_folder(), self._own_cache(name):
                loaded = self._index.load(name)
            for task in loaded["tasks"].values():
                _set_fewshot(task, num_fewshot)
        except Exception as error:  # a task is third-party code and data: anything can happen
            raise UserError(f"task {name!r}{self._place(name)} can't be loaded: {explain(error)}") from error
        _require_named_apart(name, loaded, self._index.task_index)
        for member, task in loaded["tasks"].items():
            _require_examples(member, task)
        return loaded

    def _place(self, name: str) -> str:
        """The file that defines a name, and that of its data, for messages."""
        entry = self._index.task_index.get(name)
        if entry is None or entry.yaml_path is None:
            return ""
        options = entry.cfg.get("dataset_kwargs")
        data = options.get("data_files") if isinstance(options, Mapping) else None
        return f" ({entry.yaml_path}{f', data {data}' if data else ''})"

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

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    lm_eval.api.task.tqdm = lambda documents, **_: documents  # a bar without a switch


def _require_named_apart(name: str, loaded: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Refuse a group of which lm-eval would score only some tasks, since it gives several one name.

    It does where a group lists another group, or a tag, with settings (``{task: mmlu, num_fewshot: 5}``), and hands
    these down to each task in there, the name among them.
    """
    if not loaded["tasks"]:
        raise UserError(f"task {name!r} is a group without members; name them in a list under task")
    for member in loaded["tasks"].keys() & index.keys():
        if index[member].cfg is None or "group" in index[member].cfg:
            raise UserError(
                f"task {name!r}: lm-eval gives all tasks of {member!r} one name where a group lists it with settings, "
                "so that only the last is scored; name its members in the group instead"
            )


def _require_examples(name: str, task: Any) -> None:
    """Refuse a task that has fewer documents for examples than it is set to show; one that is itself evaluated is no
    example for its own prompt. lm-eval notices only when it builds the prompts, and names neither number.
    """
    from lm_eval.api.samplers import ContextSampler, FirstNSampler

    sampler: Any = getattr(task, "sampler", None)  # tasks of a class of their own have none
    if type(sampler) not in (ContextSampler, FirstNSampler):  # others may draw as they like
        return
    wanted, are_evaluated = task.config.num_fewshot or 0, task.fewshot_cfg.split == task.config.test_split
    most = max(0, len(sampler.df) - are_evaluated)
    if wanted > most:
        itself = " (besides the one being evaluated)" if are_evaluated else ""
        raise UserError(
            f"evaluation.num_fewshot: task {name!r} is to show more examples, {wanted}, than it has documents to draw "
            f"them from{itself}; choose at most {most}"
        )
