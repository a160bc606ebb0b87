"""GGUF files as gguf's own reader sees them: every number of the checkpoint is there, in llama.cpp's order."""

import json

import gguf
import numpy as np
import pytest
import torch
from hfprune_launch.export import main
from masking import FEWER, HEADS, WIDTHS, write
from sweeps import in_process
from tiny import VOCABULARY, save_tiny, tiny_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.export.gguf_file import write_gguf
from hfprune_dist.export.gguf_tokenizer import add_tokenizer
from hfprune_dist.structures.kept import Kept

PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def pruned(folder, variant="llama", units=None, **options):
    """Return a tiny checkpoint, pruned to these units."""
    dense = save_tiny(folder / "dense", variant, **options)
    write(open_checkpoint(dense), Kept.of_all_layers(units or WIDTHS), folder / "pruned")
    return open_checkpoint(folder / "pruned")


def exported(checkpoint, file, dtype=None):
    """Return a GGUF file's fields and tensors, and what was told about it."""
    told = write_gguf(checkpoint, file, dtype)
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}, told


def named(name):
    if name in OUTSIDE or name == "lm_head.weight":
        return OUTSIDE.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    module, _, part = rest.rpartition(".")
    return f"blk.{layer}.{PARTS[module]}.{part}"


def in_halves(rows, head_dim):
    """Undo llama.cpp's order: channels that rotate together are neighbours there, here half a head apart."""
    order = [
        head + place
        for head in range(0, len(rows), head_dim)
        for first in (0, 1)
        for place in range(first, head_dim, 2)
    ]
    return rows[order]


@pytest.mark.parametrize(
    ("variant", "units", "architecture"),
    [
        ("llama", {"neurons": [torch.arange(40)] * 2}, "llama"),
        ("llama", FEWER, "llama"),  # written as mistral
        ("llama", WIDTHS | HEADS, "deci"),
        ("llama-tied-biases", WIDTHS, "deci"),
        ("mistral", WIDTHS | HEADS, "deci"),
        ("qwen2", {"neurons": [torch.arange(40)] * 2}, "qwen2"),
        ("qwen2", FEWER, "llama"),
        ("qwen2", WIDTHS | HEADS, "deci"),
        ("qwen3", FEWER, "qwen3"),
    ],
)
def test_every_number_and_size_is_in_the_file(tmp_path, variant, units, architecture):
    checkpoint = pruned(tmp_path, variant, units, max_position_embeddings=128, rope_theta=5e4)
    fields, tensors, _ = exported(checkpoint, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, trust_remote_code=True)
    state = dict(model.named_parameters())  # a tied head once
    head_dim = model.model.layers[0].self_attn.head_dim
    assert {*tensors} == {named(name) for name in state}
    for name, weight in state.items():
        found = torch.tensor(tensors[named(name)].data)
        rotates = ".q_proj." in name or ".k_proj." in name
        found = in_halves(found, head_dim) if rotates and architecture in ("llama", "deci") else found
        assert torch.equal(found, weight), name
    layers, prefix = model.model.layers, f"{architecture}."
    sizes = {
        "attention.head_count": [layer.self_attn.q_proj.out_features // head_dim for layer in layers],
        "attention.head_count_kv": [layer.self_attn.k_proj.out_features // head_dim for layer in layers],
        "feed_forward_length": [layer.mlp.gate_proj.out_features for layer in layers],
    }
    single = {
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": pytest.approx(model.config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": pytest.approx(model.config.rms_norm_eps),
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 32,
        "vocab_size": 264,
    }
    assert fields["general.architecture"] == architecture
    for key, value in (
        sizes if architecture == "deci" else {key: row[0] for key, row in sizes.items()} | single
    ).items():
        assert fields[prefix + key] == value, key


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_have_the_type_that_is_asked_for(tmp_path, dtype):
    """Rows that can't be quantized are halves; the others are as close as their type allows."""
    checkpoint = pruned(tmp_path)
    fields, tensors, told = exported(checkpoint, tmp_path / "model.gguf", dtype)
    _, whole, _ = exported(checkpoint, tmp_path / "whole.gguf", "f32")
    kinds = {name: tensor.tensor_type.name.lower() for name, tensor in tensors.items()}
    assert {kinds.pop(f"blk.{layer}.ffn_norm.weight") for layer in (0, 1)} == {"f32"}
    assert kinds.pop("blk.1.ffn_down.weight") == ("f16" if dtype == "q8_0" else dtype), "38 columns"
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {dtype}
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"]
    assert ("1 matrices, whose rows aren't multiples of 32 (prune.multiple_of), as f16" in told) == (dtype == "q8_0")
    step = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[dtype]
    for name, tensor in tensors.items():
        read, exact = gguf.quants.dequantize(tensor.data, tensor.tensor_type), whole[name].data
        assert np.abs(read - exact).max() <= step * np.abs(exact).max(), name


def test_by_default_no_number_changes(tmp_path):
    checkpoint = pruned(tmp_path, dtype=torch.bfloat16)
    _, tensors, _ = exported(checkpoint, tmp_path / "model.gguf")
    _, whole, _ = exported(checkpoint, tmp_path / "whole.gguf", "f32")
    assert tensors["output.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    for name, tensor in tensors.items():
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), whole[name].data)


def test_frequencies_of_long_texts_are_those_of_transformers(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    checkpoint = pruned(tmp_path, rope_parameters=rope)
    _, tensors, _ = exported(checkpoint, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, trust_remote_code=True)
    computed = 1e4 ** -(np.arange(0, 8, 2) / 8) / tensors["rope_freqs.weight"].data
    np.testing.assert_allclose(computed, model.model.rotary_emb.inv_freq, rtol=1e-6)
    assert computed[-1] < 1e4 ** -(6 / 8) / 4


def written_tokenizer(folder, rows=264, **parts):
    """Return the fields of a GGUF file with a tiny tokenizer, of which some parts are others."""
    tokenizer = tiny_tokenizer()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    tokenizer.save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "tokenizer.gguf", "llama")
    add_tokenizer(writer, folder, rows)
    return {key.removeprefix("tokenizer."): field.value for key, field in writer.kv_data[0].items()}


def test_the_tokenizer_is_in_the_file(tmp_path):
    fields = written_tokenizer(tmp_path)
    assert (fields["ggml.model"], fields["ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["ggml.tokens"][:259] == VOCABULARY and fields["ggml.tokens"][259:] == [
        f"[PAD{n}]" for n in range(259, 264)
    ]
    control, unused = gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    assert fields["ggml.token_type"] == [control] * 3 + [gguf.TokenType.NORMAL] * 256 + [unused] * 5
    assert [fields[f"ggml.{role}_token_id"] for role in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert fields["ggml.add_bos_token"] and not fields["ggml.add_eos_token"]


def test_a_tokenizer_that_splits_text_as_none_in_llama_cpp_is_refused(tmp_path):
    split = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    template = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)])
    for part in (
        {"pre_tokenizer": pre_tokenizers.Sequence([split, bytes_only])},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"normalizer": normalizers.Lowercase()},
        {"post_processor": template},
    ):
        with pytest.raises(UserError, match=r"its tokenizer can't be written to GGUF, only .* gpt-2, smollm, qwen2"):
            written_tokenizer(tmp_path, **part)
    with pytest.raises(UserError, match="but the embedding has 200 rows"):
        written_tokenizer(tmp_path, rows=200)


def test_splits_and_tokens_at_the_ends_are_told(tmp_path):
    digits, usual = pre_tokenizers.Digits(individual_digits=True), tiny_tokenizer().backend_tokenizer.pre_tokenizer
    template = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    parts = {"pre_tokenizer": pre_tokenizers.Sequence([digits, usual]), "post_processor": template}
    fields = written_tokenizer(tmp_path, normalizer=normalizers.NFC(), **parts)
    assert fields["ggml.pre"] == "smollm" and fields["ggml.add_bos_token"] and fields["ggml.add_eos_token"]


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    for name, (variant, units, options, why) in {
        "norms": ("qwen3", WIDTHS, {}, "where layers differ, llama.cpp has no norms of queries"),
        "window": ("mistral", WIDTHS, {"sliding_window": 64}, "GGUF has no sliding_window, here 64"),
        "rope": (
            "llama",
            WIDTHS,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "not rope_type yarn",
        ),
        "activation": ("llama", WIDTHS, {"hidden_act": "gelu"}, "hidden_act gelu"),
    }.items():
        checkpoint = pruned(tmp_path / name, variant, units, **options)
        with pytest.raises(UserError, match=why):
            write_gguf(checkpoint, tmp_path / "model.gguf")
    file = pruned(tmp_path / "default", "mistral", WIDTHS, max_position_embeddings=8192).path / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "sliding_window"}))
    with pytest.raises(UserError, match="here 4096"):
        write_gguf(open_checkpoint(file.parent), tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("value", "dtype", "why"),
    [(1e6, "f16", "beyond float16's"), (torch.nan, "q8_0", "finite"), (1e7, "q8_0", "beyond")],
)
def test_values_that_a_type_cannot_hold_are_refused(tmp_path, monkeypatch, value, dtype, why):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: torch.full(tensor.shape, value))
    with pytest.raises(UserError, match=f"output.weight has values .*{why}"):
        write_gguf(pruned(tmp_path), tmp_path / "model.gguf", dtype)


def test_the_command_leaves_a_whole_file_or_nothing(tmp_path):
    checkpoint = pruned(tmp_path, "qwen3").path
    plain, out = tmp_path / "dense", tmp_path / "new" / "model.gguf"
    died = out.parent / ".model.gguf.new"
    died.mkdir(parents=True)
    (died / "model.gguf").write_text("a part")
    code, _, said = in_process(main, str(checkpoint), str(out), "--to", "gguf")
    assert code == 2 and "no norms of queries" in said and not list(out.parent.iterdir())
    code, shown, _ = in_process(main, str(plain), str(out), "--to", "gguf", "--dtype", "f16")
    assert code == 0 and "architecture qwen3, f16" in shown and list(out.parent.iterdir()) == [out]
    before = out.read_bytes()
    code, _, said = in_process(main, str(plain), str(out), "--to", "gguf")
    assert code == 2 and "is there already" in said and out.read_bytes() == before
