"""Tokenizers that merge, as byte-level ones of real models do."""

import json

from tiny import VOCABULARY
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from hfprune_dist.export.gguf_tokenizer import SPLITS


def tokenizer_that_merges(split, *, bos):
    """Return a tokenizer that splits text as one known to llama.cpp, with merges that a wrong split would allow."""
    pairs = "1 2|12 3|' s|' t|n '|Ġ x|Ġ Ġ|Ċ Ċ|Ċ Ġ|Ġ Ċ|= 0|0 x|. ĉ|ĉ T|Ġ '|t Ġ|ĠĠ Ġ|ĊĊ Ġ|Ġ 1|k Ċ|s .|; Ġ|e Ġ|3 4"
    merges = [tuple(pair.split()) for pair in pairs.split("|")]
    words = {token: number for number, token in enumerate([*VOCABULARY, *("".join(pair) for pair in merges)])}
    steps, ignore_merges = SPLITS[split]
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges, ignore_merges=ignore_merges))
    told = [{"trim_offsets": True, **step} if step["type"] == "ByteLevel" else step for step in steps]
    splitting = {"type": "Sequence", "pretokenizers": told}
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"pre_tokenizer": splitting}))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
