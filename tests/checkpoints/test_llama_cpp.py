"""Plain checkpoints in llama.cpp: they convert, quantize, and have the perplexity that transformers computes.

Opt-in (``--engines``): building llama.cpp takes 25 minutes the first time.
"""

import json
import math
import shutil

import pytest
import torch
from llama_cpp import LlamaCpp
from masking import write
from safetensors import safe_open
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.structures.kept import Kept

pytestmark = pytest.mark.engines
CONTEXT, CHUNKS = 128, 6
# Relative differences of perplexities. With the real model, half precision costs 0.01 %; eight bits per weight cost
# 0.9 %, and 5 % once it is cut without a refit.
F16_TOLERANCE, Q8_0_TOLERANCE = 5e-3, 8e-2


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


def test_a_real_model_with_fewer_layers_and_neurons(llama_cpp, text, tmp_path, real_assets):
    dense, pruned = open_checkpoint(real_assets / "llama"), tmp_path / "pruned"
    layers = [number for number in range(dense.num_layers) if number not in (5, 26)]
    kept = {"neurons": [strongest(dense.path, number, 1504) for number in layers]}
    write(dense, Kept(tuple(layers), kept), pruned)
    assert require_same_perplexity(llama_cpp, text, tmp_path, pruned) < 1000, "it still reads English"


def strongest(folder, layer, count):
    """Return the neurons of a layer whose columns of down_proj are longest, in ascending order."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as weights:
        norms_I = weights.get_tensor(f"model.layers.{layer}.mlp.down_proj.weight").float().norm(dim=0)
    return norms_I.topk(count).indices.sort().values


@pytest.mark.parametrize(
    ("variant", "groups", "written"), [("llama", 4, "llama"), ("llama", 5, "mistral"), ("qwen3", 5, "qwen3")]
)
def test_fewer_heads_of_the_same_size(llama_cpp, text, tmp_path, real_assets, variant, groups, written):
    """Tiny models with the real one's tokenizer, which llama.cpp knows. The hidden size isn't divisible by 5 heads."""
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    shutil.copytree(real_assets / "llama", dense, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    shape = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    model = tiny_model(variant, vocab_size=len(AutoTokenizer.from_pretrained(dense)), intermediate_size=128, **shape)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # otherwise perplexities are astronomic, and so are their differences
    model.save_pretrained(dense)
    kept = {"neurons": [torch.arange(96)] * 2, "kv_groups": [torch.arange(groups)] * 2}
    write(open_checkpoint(dense), Kept.of_all_layers(kept), pruned)
    assert open_checkpoint(pruned).config["model_type"] == written
    require_same_perplexity(llama_cpp, text, tmp_path, pruned)


def require_same_perplexity(llama_cpp, text, tmp_path, folder):
    """Check both kinds of files against transformers, and return the perplexity that transformers computes."""
    expected = perplexity(folder, text.read_text())
    half, eighth = llama_cpp.convert(folder, tmp_path / "f16.gguf"), tmp_path / "q8_0.gguf"
    assert llama_cpp.perplexity(half, text, CONTEXT, CHUNKS) == pytest.approx(expected, rel=F16_TOLERANCE)
    llama_cpp.quantize(half, eighth, "Q8_0")  # refuses rows that don't divide into blocks of 32
    assert llama_cpp.perplexity(eighth, text, CONTEXT, CHUNKS) == pytest.approx(expected, rel=Q8_0_TOLERANCE)
    return expected


def perplexity(folder, text):
    """Measure perplexity as llama-perplexity does: over the second half of each chunk of the text, which begins with
    BOS if the tokenizer begins texts with it.
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
