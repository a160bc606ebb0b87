"""Tiny models' GGUF files in llama.cpp itself: its logits and tokens are those of transformers."""

import importlib
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from engine_marks import python_of
from masking import FEWER, HEADS, WIDTHS, write
from merging import tokenizer_that_merges
from tiny import save_tiny, tiny_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.pruned_config import pruned_config
from hfprune_dist.checkpoints.write_pruned import write_companions, write_weight_file
from hfprune_dist.engines.process import ask
from hfprune_dist.export.gguf_file import write_gguf
from hfprune_dist.structures.kept import Kept

pytestmark = pytest.mark.engine("llama.cpp")

LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG["original_max_position_embeddings"] = 64
IDS = torch.randint(3, 259, (100,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def llama_cpp():
    """llama.cpp's Python package, which may be in an environment of its own."""
    asked = [python_of("llama.cpp"), "-c", "import site; print(site.getsitepackages()[0])"]
    sys.path.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    yield importlib.import_module("llama_cpp_py_sync")
    sys.path.pop()


def logits_of(llama_cpp, file, ids):
    """Compute all tokens' logits in llama.cpp, with keys and values in float32, and the tokens of texts."""
    options = {"type_k": "f32", "type_v": "f32", "flash_attn_type": 0, "n_threads": 1}
    with llama_cpp.Llama(str(file), n_ctx=128, n_batch=128, **options) as model:
        lib, ffi = model._lib, model._ffi
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert lib.llama_decode(model._ctx, batch) == 0
        rows = [lib.llama_get_logits_ith(model._ctx, place) for place in range(len(ids))]
        logits = [np.frombuffer(ffi.buffer(row, 4 * model.n_vocab), np.float32).copy() for row in rows]
        lib.llama_batch_free(batch)
        return np.stack(logits), [model.tokenize(text) for text in TEXTS]


TEXTS = [
    tiny_text(20, 0),
    "It's 12345 o'clock\n\n  and we're   done.\tTabs",
    "naïve façade — 東京 🎉",
    " x=0xFF; don't",
]


def assert_alike(llama_cpp, folder):
    """Compare llama.cpp with transformers, in logits and in tokens."""
    write_gguf(open_checkpoint(folder), folder.with_suffix(".gguf"), "f32")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([IDS])).logits[0].log_softmax(-1)
    found, tokens = logits_of(llama_cpp, folder.with_suffix(".gguf"), IDS)
    assert (torch.tensor(found).log_softmax(-1) - expected).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokens == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("variant", "units", "options", "split"),
    [
        ("llama", FEWER, {"rope_parameters": LONG}, "llama-bpe"),
        ("llama", WIDTHS | HEADS, {}, "smollm"),
        ("llama", WIDTHS | HEADS, {"rope_parameters": LONG}, "llama-bpe"),
        ("llama-tied-biases", FEWER, {}, "gpt-2"),
        ("llama-tied-biases", WIDTHS | HEADS, {}, "gpt-2"),
        ("mistral", WIDTHS | HEADS, {}, "gpt-2"),
        ("qwen2", {"neurons": [torch.arange(40)] * 2}, {"head_dim": 8}, "qwen2"),
        ("qwen2", FEWER, {}, "qwen2"),
        ("qwen2", WIDTHS | HEADS, {}, "qwen2"),
        ("qwen3", FEWER, {}, "qwen2"),
    ],
)
def test_llama_cpp_computes_what_transformers_does(llama_cpp, tmp_path, variant, units, options, split):
    dense = save_tiny(tmp_path / "dense", variant, **{"head_dim": 16, "vocab_size": 300, **options})
    tokenizer_that_merges(split, bos=split == "llama-bpe").save_pretrained(dense)
    write(open_checkpoint(dense), Kept.of_all_layers(units), tmp_path / "pruned")
    assert_alike(llama_cpp, tmp_path / "pruned")


def test_biases_of_output_projections_are_llama_cpps_too(llama_cpp, tmp_path):
    checkpoint, folder = open_checkpoint(save_tiny(tmp_path / "dense", vocab_size=300)), tmp_path / "pruned"
    tokenizer_that_merges("gpt-2", bos=False).save_pretrained(checkpoint.path)
    modules, kept = ["self_attn.o_proj", "mlp.down_proj"], Kept.of_all_layers(WIDTHS | HEADS)
    biases = {
        checkpoint.units.tensor(layer, f"{module}.bias"): torch.randn(32) for layer in (0, 1) for module in modules
    }
    folder.mkdir()
    for file in checkpoint.weight_files:
        write_weight_file(checkpoint, file, kept, folder, {name: partial(biases.get, name) for name in biases})
    write_companions(checkpoint, folder, pruned_config(checkpoint, kept.shape, biased=modules))
    assert_alike(llama_cpp, folder)


def test_why_it_loads_no_model_is_told(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"junk")
    request = {"model": str(tmp_path / "model.gguf"), "sequences": [[1, 2]], "new_tokens": 1, "options": {}}
    assert "invalid magic" in ask("llama.cpp", python_of("llama.cpp"), tmp_path, request)["error"]
