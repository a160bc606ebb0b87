"""Finding checkpoints by the names that a user gives, and the hashes that identify their content.

A dry run plans with stand-ins for models of the hub that aren't downloaded: files that have the shapes of the weights.
Where the hub can't be asked for these, they have those of another model: enough to plan with, and never shown.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import LICENCE_PATTERNS, TOKENIZER_FILES, Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE, read_headers
from hfprune_dist.config.load import absolute_path, is_hub_id, parse
from hfprune_dist.config.schema import ModelAlias, SweepConfig
from hfprune_dist.config.yaml_text import read_yaml
from hfprune_dist.errors import UserError, did_you_mean, hub_errors
from hfprune_dist.planning.user_files import content_files
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.hashing import FileHashes, digest_of
from hfprune_dist.store.stage import Content

# What is downloaded; Mistral's models hold all weights twice, once more in their publisher's own format.
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "tokenization_*.py"]
DOWNLOADED += LICENCE_PATTERNS
TWICE = ["consolidated*.safetensors"]
TIMEOUT_S = 10.0
# A shape of which every method can make something, Llama-3.1-8B's, and its tensors outside of layers and in each.
ASSUMED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
AROUND = {"model.embed_tokens": [128256, 4096], "model.norm": [4096], "lm_head": [128256, 4096]}
LAYER = {
    "input_layernorm": [4096],
    "self_attn.q_proj": [4096, 4096],
    "self_attn.k_proj": [1024, 4096],
    "self_attn.v_proj": [1024, 4096],
    "self_attn.o_proj": [4096, 4096],
    "post_attention_layernorm": [4096],
    "mlp.gate_proj": [14336, 4096],
    "mlp.up_proj": [14336, 4096],
    "mlp.down_proj": [4096, 14336],
}
# Of a file of weights: tensor -> dtype, shape and data_offsets.
Header = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ModelSource:
    """A dense model of the sweep.

    Attributes:
        name: short, for labels.
        identity: the digest that identifies its content.
        spelling: its name in a configuration's ``models``, valid in any folder: alias, hub id or absolute path.
        content: how ``identity`` is computed from its files.
        is_here: whether all of it is on this machine; otherwise ``checkpoint`` is a stand-in.
        has_known_shape: whether the shape of ``checkpoint`` is the model's own.
    """

    name: str
    checkpoint: Checkpoint
    identity: str
    spelling: str
    content: Content
    is_here: bool = True
    has_known_shape: bool = True


def resolve_models(config: SweepConfig, shipped: Path, hashes: FileHashes, download: bool) -> list[ModelSource]:
    """Find the folder and identity of every model of the sweep; unknown aliases and damaged checkpoints are refused.

    Args:
        shipped: folder with the alias files that come with the project.
        download: fetch hub models that are not in the local cache; otherwise stand-ins take their places.
    """
    files = {file.stem: file for file in sorted(shipped.glob("*.yaml"))}  # only those that are used are read
    aliases: dict[str, ModelAlias | Path] = {**files, **config.aliases}
    sources = [_resolve(name, aliases, hashes, download) for name in config.models]
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            raise UserError(f"--models: two models are called {name!r}; give one of them an alias, or leave it out")
    return sources


def _resolve(name: str, aliases: Mapping[str, ModelAlias | Path], hashes: FileHashes, download: bool) -> ModelSource:
    alias = aliases.get(name)
    if isinstance(alias, Path):
        alias = parse(ModelAlias, read_yaml(alias, "alias", "the keys of an alias"), str(alias))
    if alias is not None and alias.path is not None:
        return _local(name, Path(alias.path), hashes, name)
    if alias is not None and alias.hub_id is not None:  # it has one of the two
        return _hub_model(name, alias.hub_id, alias.revision, name, download)
    folder = Path(name)
    if folder.is_file():
        raise UserError(f"--models: {name} is a file; give the folder of a Hugging Face checkpoint")
    if not folder.is_dir() and is_hub_id(name):
        hub_id, _, revision = name.partition("@")
        try:
            return _hub_model(name.split("/", 1)[1], hub_id, revision or "main", name, download)
        except UserError as error:
            raise UserError(f"{error}; nor is there a folder {name}") from None
    if not (folder.is_dir() or os.sep in name):
        raise UserError(
            f"--models: unknown model {name!r}{did_you_mean(name, aliases)}; valid: {', '.join(sorted(aliases))}, "
            "the folder of a Hugging Face checkpoint, or a hub id (org/name)"
        )
    spelling = absolute_path(name, Path.cwd())
    return _local(Path(spelling).name, Path(spelling).resolve(), hashes, spelling)


def _local(name: str, folder: Path, hashes: FileHashes, spelling: str) -> ModelSource:
    checkpoint = open_checkpoint(folder)
    identity = hashes.of_files(folder, content_files(checkpoint))
    return ModelSource(name, checkpoint, identity, spelling, "checkpoint")


def _hub_model(name: str, hub_id: str, revision: str, spelling: str, download: bool) -> ModelSource:
    """A model in the hub's cache, or a stand-in for it."""
    from huggingface_hub import errors, snapshot_download

    refusals: tuple[type[Exception], ...] = (errors.NotASafetensorsRepoError, *hub_errors())
    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": DOWNLOADED, "ignore_patterns": TWICE}
    is_here = is_known = True
    try:
        try:
            folder = Path(snapshot_download(hub_id, **wanted, local_files_only=not download))
        except errors.LocalEntryNotFoundError as error:  # what others have fetched may be enough
            folder = Path(getattr(error, "snapshot_path", os.devnull))
            if download and not _has_weights(folder):
                raise
        if not (download or _has_weights(folder)):  # an earlier dry run leaves but a config.json
            folder, is_here = _stand_in(hub_id, revision), False
    except refusals as error:
        # Otherwise the hub is out of reach, or keeps the model from whoever has no licence.
        refuses = isinstance(error, (errors.HfHubHTTPError, errors.NotASafetensorsRepoError))
        has_no_such = refuses and not isinstance(error, errors.GatedRepoError)
        if download or has_no_such:
            told = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"model {name!r}: {hub_id}@{revision} can't be downloaded: {told}; check the network; for a gated "
                "model, accept its licence on its page and run `hf auth login`"
            ) from None
        folder, is_here, is_known = _folder("unknown", ASSUMED, {SINGLE_FILE: _assumed_header()}), False, False
    checkpoint = open_checkpoint(folder)
    # The last part of a snapshot's folder is the commit that the revision stood for.
    identity = digest_of([hub_id, checkpoint.path.name])
    return ModelSource(name, checkpoint, identity, spelling, "commit", is_here, is_known)


def _has_weights(folder: Path) -> bool:
    with suppress(UserError):
        return bool(read_headers(folder))
    return False


def _assumed_header() -> Header:
    layers = {f"model.layers.{layer}.{name}": shape for layer in range(32) for name, shape in LAYER.items()}
    header, end = {}, 0
    for name, shape in {**AROUND, **layers}.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    return header


def _stand_in(hub_id: str, revision: str) -> Path:
    """A folder like a model's, in a temporary one that goes with this process: its config.json, and files without
    content whose headers are those of its weights; named like its commit.
    """
    from huggingface_hub import HfApi, hf_hub_download

    hub = HfApi()
    commit = str(hub.model_info(hub_id, revision=revision, timeout=TIMEOUT_S).sha)
    config = json.loads(Path(hf_hub_download(hub_id, "config.json", revision=commit)).read_text(encoding="utf-8"))
    files = hub.get_safetensors_metadata(hub_id, revision=commit, timeout=TIMEOUT_S).files_metadata
    headers = {
        file: {tensor: asdict(info) for tensor, info in header.tensors.items()} for file, header in files.items()
    }
    return _folder(commit, config, headers)


def _folder(name: str, config: Mapping[str, Any], headers: Mapping[str, Header]) -> Path:
    above = Path(tempfile.mkdtemp(prefix="hfprune-"))
    atexit.register(shutil.rmtree, above, ignore_errors=True)
    folder = above / name
    folder.mkdir()
    write_json(folder / "config.json", dict(config))
    (folder / TOKENIZER_FILES[0]).touch()
    for file, header in headers.items():
        text = json.dumps(header, allow_nan=False).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(stream.tell() + max(tensor["data_offsets"][1] for tensor in header.values()))
    if len(headers) > 1:
        weight_map = {tensor: file for file, header in headers.items() for tensor in header}
        write_json(folder / INDEX_FILE, {"weight_map": weight_map})
    return folder
