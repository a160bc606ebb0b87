"""config.json with what transformers 5 has renamed under the earlier names too, which many engines still read alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hfprune_dist.store.atomic_files import write_text


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json, with each earlier name that doesn't change what transformers reads.

    Args:
        folder: a draft, since the file is written several times.
    """
    content = copy.deepcopy(dict(config))
    text = content.get("text_config", content)
    expected = _read(content, folder)
    for name, value in _older_names(text).items():
        if value is not None and name not in text:
            text[name] = value
            if _read(content, folder) != expected:
                del text[name]
    write_text(folder / "config.json", _json(content))


def _older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Earlier name -> value; of rope, where kinds of layers differ, it is that of full attention."""
    kinds = config.get("rope_parameters") or {}
    rope = dict(kinds.get("full_attention") or kinds)
    theta, rotated = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", None)
    return {
        "rope_theta": theta,
        "rotary_emb_base": theta,
        "rope_local_base_freq": (kinds.get("sliding_attention") or {}).get("rope_theta"),
        "partial_rotary_factor": rotated,
        "rotary_pct": rotated,
        "rope_scaling": None if rope == {"rope_type": "default"} else rope or None,
        "num_experts": config.get("num_local_experts"),
        "torch_dtype": config.get("dtype"),
    }


def _read(content: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """What transformers makes of a config.json; None if it refuses it."""
    (folder / "config.json").write_text(_json(content), encoding="utf-8")
    try:
        read: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    except Exception:  # which ones a configuration class raises isn't documented
        return None
    return read


def _json(content: Mapping[str, Any]) -> str:
    # Not by write_json: it refuses infinite numbers, which transformers before 5 wrote as they are (bamba).
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
