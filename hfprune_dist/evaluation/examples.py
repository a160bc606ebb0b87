"""Examples in prompts: whether a task has enough documents to draw ``evaluation.num_fewshot`` of them.

lm-eval notices only when it builds the prompts, and then names neither the setting nor the documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.task_definitions import Definition, own_definitions, with_included
from hfprune_dist.evaluation.task_files import data_folder, matching, paths_in

# Keys of groups that don't change what their members are.
_GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
# Keys of tasks whose documents are known only to code.
_CODE_KEYS = ("class", "custom_dataset", "process_docs")
_SAMPLERS = ("default", "first_n")
# Longest file that is read as a whole.
_MOST_BYTES = 16 * 1024 * 1024


def check_examples(tasks: Sequence[str], include_path: Path | None, num_fewshot: int | None) -> None:
    """Refuse more examples than one of the user's own tasks has documents, where a glance at local JSON files tells.

    Of other tasks, ``require_examples`` finds out when they are loaded.

    Args:
        num_fewshot: None: each task's own number.

    Raises:
        UserError: naming the setting, the task, and the number of documents.
    """
    own, _ = own_definitions(include_path)
    for name in _as_defined(tasks, own):
        assert include_path is not None, "has tasks"
        content = with_included(own[name].file)
        usual = content.get("num_fewshot")
        wanted = usual if num_fewshot is None or usual == 0 else num_fewshot
        if isinstance(wanted, int) and wanted > 0:
            split, documents = _example_documents(content, include_path, wanted + 1)
            if documents is not None:
                _require(name, wanted, documents, split == content.get("test_split"))


def require_examples(name: str, task: Any) -> None:
    """Refuse a loaded lm-eval task that has fewer documents for examples than it is set to show.

    Raises:
        UserError: naming the setting, the task, and the number of documents.
    """
    from lm_eval.api.samplers import ContextSampler, FirstNSampler

    sampler: Any = getattr(task, "sampler", None)  # tasks of a class of their own have none
    if type(sampler) in (ContextSampler, FirstNSampler):  # others may draw as they like
        wanted = task.config.num_fewshot or 0
        _require(name, wanted, len(sampler.df), task.fewshot_cfg.split == task.config.test_split)


def _require(name: str, wanted: int, documents: int, are_evaluated: bool) -> None:
    """Check a number of examples; a document that is itself evaluated is no example for its own prompt."""
    most = max(0, documents - are_evaluated)
    if wanted > most:
        itself = " (besides the one being evaluated)" if are_evaluated else ""
        raise UserError(
            f"evaluation.num_fewshot: task {name!r} is to show more examples, {wanted}, than it has documents to draw "
            f"them from{itself}; choose at most {most}"
        )


def _as_defined(tasks: Sequence[str], own: Mapping[str, Definition]) -> Iterator[str]:
    """Yield those of the user's own tasks that are evaluated as their files say, also in groups without settings."""
    wanted = list(tasks)
    for name in wanted:  # grows while groups unfold
        definition = own.get(name)
        if definition is not None and definition.kind == "task":
            yield name
        elif definition is not None and definition.kind == "group":
            content = with_included(definition.file)
            members = content["task"] if isinstance(content.get("task"), list) else []
            plain = members if content.keys() <= _GROUP_KEYS else []
            wanted += [member for member in plain if isinstance(member, str) and member not in wanted]


def _example_documents(content: Mapping[str, Any], folder: Path, enough: int) -> tuple[str | None, int | None]:
    """The split that a task sets for its examples, and how many documents there are for these; None: not known.

    Documents are counted up to ``enough``.
    """
    settings = content.get("fewshot_config") or {}
    if not isinstance(settings, Mapping) or any(it.get(key) for it in (content, settings) for key in _CODE_KEYS):
        return None, None
    split = settings.get("split", content.get("fewshot_split"))
    samples = settings.get("samples")
    if settings.get("fewshot_indices") or settings.get("sampler", "default") not in _SAMPLERS:
        return split, None
    if split is None and samples is not None:
        return split, len(samples) if isinstance(samples, list) else None
    splits = (split, *(content.get(f"{it}_split") for it in ("training", "validation", "test")))
    drawn = next((it for it in splits if it is not None), None)
    return split, _count(_files_of(drawn, content, folder), enough)


def _files_of(split: Any, content: Mapping[str, Any], folder: Path) -> list[Path]:
    """The JSON files of a split; none if they aren't local, or are read in a way of their own."""
    options = content.get("dataset_kwargs")
    if content.get("dataset_path") != "json" or not isinstance(options, Mapping):
        return []
    if not options.keys() <= {"data_files", "data_dir"}:
        return []
    data_files = options.get("data_files")
    if isinstance(data_files, Mapping):
        data_files = data_files.get(split)
    elif split != "train":  # the library's name for all that has none
        return []
    patterns = list(paths_in(data_files))
    if any("://" in pattern for pattern in patterns):
        return []
    place = data_folder(content, folder)
    return list(dict.fromkeys(file for pattern in patterns for file in matching(place / pattern)))


def _count(files: Sequence[Path], enough: int) -> int | None:
    """Number of documents in files, counted up to ``enough``; None if there are no files, or that can't be told."""
    total = 0
    for file in files:
        number = _count_in(file, enough - total)
        if number is None:
            return None
        total += number
    return total if files else None


def _count_in(file: Path, enough: int) -> int | None:
    try:
        with file.open("rb") as stream:
            is_list = stream.read(1) == b"["
            stream.seek(0)
            if not is_list:
                return _count_objects(islice(filter(bytes.strip, stream), enough))
            documents = json.loads(stream.read()) if file.stat().st_size <= _MOST_BYTES else None
    except (OSError, ValueError, RecursionError):  # compressed, or damaged, which the stage reports
        return None
    return len(documents) if isinstance(documents, list) else None


def _count_objects(lines: Iterable[bytes]) -> int | None:
    objects = [isinstance(json.loads(line), dict) for line in lines]
    return len(objects) if all(objects) else None
