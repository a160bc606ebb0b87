"""Stand-ins for models of the hub that aren't downloaded, with which a dry run plans.

A stand-in is a folder like the model's: its config.json, and files without content whose headers are those of its
weights. If the hub can't be asked for these, it has the shape of another model: enough to plan with, and never shown.
"""

from __future__ import annotations

import atexit
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import TOKENIZER_FILES
from hfprune_dist.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from hfprune_dist.errors import UserError, hub_errors
from hfprune_dist.store.atomic_files import write_json

TIMEOUT_S = 10.0
# A shape of which every method can make something, Llama-3.1-8B's, and its tensors outside of layers and in each.
_ASSUMED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_AROUND = {"model.embed_tokens": [128256, 4096], "model.norm": [4096], "lm_head": [128256, 4096]}
_LAYER = {
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


def stand_in(name: str, hub_id: str, revision: str) -> tuple[Path, bool]:
    """Make the stand-in of a model, in a temporary folder that is named like its commit and goes with this process.

    Returns:
        the folder, and whether its shape is the model's.

    Raises:
        UserError: if the hub has no such model or revision, or no safetensors of it.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, NotASafetensorsRepoError

    hub = HfApi()
    try:
        commit = str(hub.model_info(hub_id, revision=revision, timeout=TIMEOUT_S).sha)
        config = json.loads(Path(hf_hub_download(hub_id, "config.json", revision=commit)).read_text(encoding="utf-8"))
        files = hub.get_safetensors_metadata(hub_id, revision=commit, timeout=TIMEOUT_S).files_metadata
    except (NotASafetensorsRepoError, HfHubHTTPError) as error:
        if not isinstance(error, GatedRepoError):
            raise UserError(f"model {name!r}: {hub_id}@{revision} can't be downloaded: {error}") from None
    except hub_errors():  # offline, or out of reach
        pass
    else:
        headers = {
            file: {tensor: asdict(info) for tensor, info in header.tensors.items()} for file, header in files.items()
        }
        return _folder(commit, config, headers), True
    return _folder("unknown", _ASSUMED, {SINGLE_FILE: _assumed_header()}), False


def _assumed_header() -> Header:
    layers = {f"model.layers.{layer}.{name}": shape for layer in range(32) for name, shape in _LAYER.items()}
    header, end = {}, 0
    for name, shape in {**_AROUND, **layers}.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    return header


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
