"""Implementation of launch/publish.py: a named checkpoint -> its files -> a repository on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from hfprune_launch.screen import make_console, say
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    DEFAULT_IGNORE_PATTERNS,
    filter_repo_objects,
    validate_repo_id,
)

from hfprune_dist.errors import UserError, did_you_mean, hub_errors
from hfprune_dist.results.base_model import CARD
from hfprune_dist.results.formats import counted
from hfprune_dist.results.named_checkpoints import ADAPTER_CONFIG, CHECKPOINTS
from hfprune_dist.store.artifacts import MANIFEST
from hfprune_dist.store.atomic_files import read_object


def publish(out: Path, name: str, repo_id: str, *, private: bool, dry_run: bool) -> None:
    """Push a checkpoint, or show what would be pushed.

    Raises:
        UserError: if there is no such checkpoint, it is incomplete, its card can't be read, or the hub refuses.
    """
    _check_repo_id(repo_id)
    folder = _folder(out, name)
    left_out = _left_out(folder)
    _check_whole(folder, out / "store")
    ignored = [f"{left_out}/*"] if left_out else []
    files = _files(folder, [*DEFAULT_IGNORE_PATTERNS, *ignored])
    notes = _notes_on_card(folder / CARD)
    if left_out:
        notes.append(f"{left_out}/ stays here: its base model is not on the hub (it is part of the weights)")
    console = make_console(works_on=not dry_run)
    for file, size in files.items():
        say(console, f"{size:>15,} bytes  {file}")
    for note in notes:
        say(console, f"note: {note}")
    total = f"{sum(files.values()):,} bytes in {counted(len(files), 'file')}"
    if dry_run:
        say(console, f"would be pushed to {repo_id}: {total}")
        return
    place = _push(folder, repo_id, private, ignored)
    say(console, f"pushed: {total}, to {place}")


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} can't be a repository of the hub: {error}") from None


def _folder(out: Path, name: str) -> Path:
    root = out / CHECKPOINTS
    names = sorted(it.name for it in root.glob("[!.]*") if it.is_dir())
    if name not in names:
        known = f"valid: {', '.join(names)}" if names else "there is none (yet): they are made when a row is finished"
        raise UserError(f"{root}: no checkpoint {name!r}{did_you_mean(name, names)}; {known}")
    return root / name


def _check_whole(folder: Path, store: Path) -> None:
    """Refuse a folder that lacks files of the artifact that it links to."""
    root = store.resolve()
    targets = [path.resolve() for path in folder.rglob("*") if path.is_symlink()]
    artifacts = {root.joinpath(*it.relative_to(root).parts[:2]) for it in targets if it.is_relative_to(root)}
    manifests = [read_object(artifact / MANIFEST) or {} for artifact in artifacts]
    names = sorted(name for manifest in manifests for name in manifest.get("files", {}))
    if lacking := [name for name in names if not os.path.lexists(folder / name)]:
        raise UserError(f"{folder}: {lacking[0]} is missing; report.py makes the folder whole again")


def _left_out(folder: Path) -> str | None:
    """Return the adapter's folder if its base isn't available to others, else None."""
    config = read_object(folder / ADAPTER_CONFIG)
    if config is None:
        return None
    base = config.get("base_model_name_or_path")
    try:
        validate_repo_id(str(base or ""))
    except HFValidationError:  # a folder, which users may have made absolute; or none
        return Path(ADAPTER_CONFIG).parts[0]
    return None


def _files(folder: Path, ignored: list[str]) -> dict[str, int]:
    """Name -> size in bytes of every file that is pushed.

    Args:
        ignored: globs of names that the hub's client leaves out.

    Raises:
        UserError: if a link is broken.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: the file in the store is gone; run the sweep again to make what is missing")
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
    return {name: files[name] for name in filter_repo_objects(files, ignore_patterns=ignored)}


def _notes_on_card(file: Path) -> list[str]:
    """Return notes on what readers of a card will miss.

    Raises:
        UserError: if the hub could not read the card.
    """
    try:
        data = ModelCard.load(file).data.to_dict()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{file}: no card that the hub can read ({error}); mend it, or remove it and run report.py"
        ) from None
    titles = {"license": "a licence", "base_model": "the base model's id"}
    missing = [f"{title} ({key})" for key, title in titles.items() if not data.get(key)]
    return [f"{file} doesn't name {' or '.join(missing)}, since it isn't known here"] if missing else []


def _push(folder: Path, repo_id: str, private: bool, ignored: list[str]) -> str:
    """Push a folder, and return the address of the commit.

    Raises:
        UserError: if the hub refuses, or if ``private`` is asked for and the repository exists and is public.
    """
    api = HfApi()
    with _refusals_told(repo_id):
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id  # with the owner's name
        is_exposed = private and not api.model_info(repo_id).private
    if is_exposed:
        raise UserError(
            f"--private: {repo_id} already exists and is public; make it private in its settings, or name another one"
        )
    with _refusals_told(repo_id):
        pushed = api.upload_folder(
            repo_id=repo_id, folder_path=folder, ignore_patterns=ignored, commit_message=f"Add {folder.name}"
        )
    return str(pushed.commit_url)


@contextmanager
def _refusals_told(repo_id: str) -> Iterator[None]:
    try:
        yield
    except hub_errors() as error:  # ValueError: also of a card or a token
        raise UserError(
            f"{repo_id}: the hub refused, or can't be reached: {error}; run `hf auth login` with a token that may "
            "write there"
        ) from None
