"""Plain checkpoints in llama.cpp: they convert, quantize, and have the perplexity that transformers computes.

Opt-in (``--engines``): building llama.cpp takes 25 minutes the first time.
"""

import json
import math
import shutil

import pytest
import torch
from hfprune_launch.api import Session
from llama_cpp import LlamaCpp
from masking import write
from ranks import ROOT
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.structures.kept import Kept

pytestmark = pytest.mark.engines
CONTEXT, CHUNKS = 128, 6
# Relative, of perplexities. Half precision rounds activations too; eight bits a weight cost about as much again.
F16_TOLERANCE, Q8_0_TOLERANCE = 5e-3, 3e-2


@pytest.fixture(scope="module")
def llama_cpp():
    return LlamaCpp()


@pytest.fixture(scope="module")
def text(real_assets, tmp_path_factory):
    """Prose that no calibration has seen."""
    lines = (real_assets / "text" / "heldout.jsonl").read_text().splitlines()
    file = tmp_path_factory.mktemp("text") / "heldout.txt"
    file.write_text("\n\n".join(json.loads(line)["text"] for line in lines))
    return file


@pytest.fixture(scope="module")
def pruned(real_assets, tmp_path_factory):
    """SmolLM2-135M without a fifth of its parameters, by the plain method."""
    session = Session(
        tmp_path_factory.mktemp("plain") / "out",
        ROOT / "configs" / "demo.yaml",
        models=["llama"],
        aliases={"llama": {"path": str(real_assets / "llama")}},
        ratios=[0.2],
        methods=["surgeon-plain"],
        prune={"multiple_of": 32},
        calibration={
            "mixture": None,
            "path": str(real_assets / "text" / "calibration.jsonl"),
            "samples": 4,
            "sequence_length": 64,
        },
        recovery={"method": "none"},
        evaluation={"tasks": [], "fidelity": {"texts": None, "path": str(real_assets / "text" / "heldout.jsonl")}},
    )
    (folder,) = session.prune().values()
    return folder


def fewer_heads(variant, tokenizer, folder):
    """A tiny model with 5 of 8 KV groups, which don't divide its hidden size, and a tokenizer that llama.cpp knows."""
    dense = folder / "dense"
    shutil.copytree(tokenizer, dense, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 128}
    model = tiny_model(variant, vocab_size=len(AutoTokenizer.from_pretrained(dense)), **sizes)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # else perplexities are astronomic, and so are their differences
    model.save_pretrained(dense)
    kept = {"neurons": [torch.arange(96)] * 2, "kv_groups": [torch.arange(5)] * 2}
    write(open_checkpoint(dense), Kept.of_all_layers(kept), folder / "pruned")
    return folder / "pruned"


def test_a_plainly_pruned_model(llama_cpp, text, tmp_path, pruned):
    assert open_checkpoint(pruned).config["model_type"] == "llama"
    require_same_perplexity(llama_cpp, text, tmp_path, pruned)


@pytest.mark.parametrize(("variant", "written"), [("llama", "mistral"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_heads_that_do_not_divide_the_hidden_size(llama_cpp, text, tmp_path, real_assets, variant, written):
    folder = fewer_heads(variant, real_assets / "llama", tmp_path)
    assert open_checkpoint(folder).config["model_type"] == written
    require_same_perplexity(llama_cpp, text, tmp_path, folder)


def require_same_perplexity(llama_cpp, text, tmp_path, folder):
    assert open_checkpoint(folder).config["intermediate_size"] % 32 == 0
    expected = perplexity(folder, text.read_text())
    half, eighth = llama_cpp.convert(folder, tmp_path / "f16.gguf"), tmp_path / "q8_0.gguf"
    assert llama_cpp.perplexity(half, text, CONTEXT, CHUNKS) == pytest.approx(expected, rel=F16_TOLERANCE)
    assert "fallback" not in llama_cpp.quantize(half, eighth, "Q8_0")  # as where rows don't divide into blocks of 32
    assert llama_cpp.perplexity(eighth, text, CONTEXT, CHUNKS) == pytest.approx(expected, rel=Q8_0_TOLERANCE)


def perplexity(folder, text):
    """As llama-perplexity measures it: over the second half of each chunk of the text, which begins with BOS where the
    tokenizer begins a text with it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(text).input_ids
    losses = []
    for chunk in range(CHUNKS):
        ids_T = torch.tensor(ids[chunk * CONTEXT : (chunk + 1) * CONTEXT])
        read_T = ids_T.clone()
        if ids[0] == tokenizer.bos_token_id:
            read_T[0] = tokenizer.bos_token_id
        with torch.no_grad():
            log_probabilities_TV = model(read_T[None]).logits[0].double().log_softmax(-1)
        scored = torch.arange(CONTEXT // 2, CONTEXT - 1)
        losses.append(-log_probabilities_TV[scored, ids_T[scored + 1]])
    return math.exp(torch.cat(losses).mean())
