"""The weight files in a checkpoint's folder: a single file, or those listed in an index."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.lfs_pointers import refuse_pointer
from hfprune_dist.checkpoints.safetensors_header import TensorInfo, read_safetensors_header
from hfprune_dist.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Weight files in other formats -> what to do about them.
_FOREIGN_WEIGHTS = {
    "*.gguf": "GGUF, the format of llama.cpp; take the safetensors checkpoint that it was made from",
    "pytorch_model*.bin": (
        'pickled weights; convert them with python -c "from transformers import AutoModelForCausalLM, AutoTokenizer; '
        "[kind.from_pretrained('{path}', **options).save_pretrained('{path}-safetensors') for kind, options in "
        "((AutoModelForCausalLM, dict(dtype='auto')), (AutoTokenizer, dict()))]\""
    ),
    "*.pth": "weights in their publisher's own format; convert them with the script convert_*_weights_to_hf.py of "
    "transformers",
}


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """The tensors of all weight files.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    weight_map = _weight_map(path)
    files = _weight_files(path, sorted(set(weight_map.values())))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_safetensors_header(path / file).items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is in two files, {tensors[name].file} and {file}")
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(f"{path / INDEX_FILE}: tensor {name} should be in {file}, which lacks it; download again")
    if not tensors:
        raise UserError(f"{path}: there are no tensors in {', '.join(files)}; download it again")
    return tensors


def _weight_files(path: Path, indexed: list[str]) -> list[str]:
    """Names of the weight files: those in the index, or the only one there is."""
    if (path / SINGLE_FILE).is_file():
        if indexed not in ([], [SINGLE_FILE]):  # transformers would read the single file
            raise UserError(f"{path}: has both {SINGLE_FILE} and an {INDEX_FILE} that names other files; remove one")
        return [SINGLE_FILE]
    if indexed:
        return indexed
    for pattern, what in _FOREIGN_WEIGHTS.items():
        if foreign := matching(path, [pattern]):
            raise UserError(f"{path}: only safetensors weights are supported; {foreign[0]}: {what.format(path=path)}")
    raise UserError(f"{path}: no {SINGLE_FILE} or {INDEX_FILE}; only safetensors weights are supported")


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> its file, as stated in the index; empty if there is no index."""
    if not (path / INDEX_FILE).is_file():
        return {}
    weight_map = read_json_object(path / INDEX_FILE, "").get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
        raise UserError(f"{path / INDEX_FILE}: weight_map must give the file of every tensor; download it again")
    return weight_map


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def matching(path: Path, patterns: Iterable[str]) -> list[str]:
    """Names, relative to a folder, of its files that match any of the patterns."""
    return sorted({str(file.relative_to(path)) for it in patterns for file in path.glob(it) if file.is_file()})


def read_json_object(file: Path, why: str) -> dict[str, Any]:
    """Read a JSON object from a file; ``why`` tells users, in messages, why the file must exist.

    Raises:
        UserError: if the file is missing or holds no JSON object.
    """
    try:
        refuse_pointer(file)
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing" + (f"; {why}" if why else "")) from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; download it again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content
