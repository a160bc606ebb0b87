"""A llama written as mistral gives a text the same ids, although transformers makes their tokenizers differently."""

import json

import pytest
import torch
from masking import write
from tiny import VOCABULARY, save_tiny, tiny_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.structures.kept import Kept

MERGES = [("▁", "b"), ("a", "n"), ("▁b", "an"), ("e", "n"), ("▁", "d")]
PIECES = ["<unk>", "<s>", "</s>", *"abcdefghijklmnoprstuv .,\n▁", *(left + right for left, right in MERGES)]
TEXTS = [" ban  den</s>ban ", "ban\n\n<s>  den 12,3", "</s> ban", "", tiny_text(30, 0)]


def of_pieces(normalizer, pre_tokenizer):
    """Return a tokenizer in the form of a tokenizer.json that was converted from a sentencepiece model."""
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    special = [("<s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special)
    return tokenizer


def of_bytes():
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(VOCABULARY)}, []))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZERS = {
    "metaspace": lambda: of_pieces(None, pre_tokenizers.Metaspace("▁", "first", split=False)),
    "nothing before a text": lambda: of_pieces(normalizers.Replace(" ", "▁"), None),
    "bytes": of_bytes,
}


def ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [[tokenizer(text, add_special_tokens=special).input_ids for text in TEXTS] for special in (True, False)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "intermediate_size": 4}
    return save_tiny(tmp_path_factory.mktemp("twin") / "dense", **sizes)


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_the_dense_model(dense, tmp_path, name, kind):
    kept = Kept.of_all_layers({"kv_groups": [torch.arange(3)]})
    TOKENIZERS[name]().save(str(dense / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": kind}
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    write(open_checkpoint(dense), kept, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mistral"
    assert ids(tmp_path) == ids(dense)
