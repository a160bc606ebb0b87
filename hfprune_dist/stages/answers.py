"""Answers: the dense model's responses to instructions, in place of those that a text holds.

Instructions are cut into batches, the same on any number of ranks. One rank answers a batch and keeps that in the work
folder: a killed stage goes on with the batches that are missing.
"""

from __future__ import annotations

import json
from itertools import islice, takewhile
from typing import Any

import torch
from transformers import GenerationConfig

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.training import TrainingText
from hfprune_dist.data.examples import UNFINISHED, Example, read_examples
from hfprune_dist.data.instructions import encode
from hfprune_dist.data.tokenizer import load_tokenizer, require_eos
from hfprune_dist.distributed.frozen_model import FrozenModel, choose_sharding
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.answers import ANSWERS, AnswersParameters
from hfprune_dist.kinds.memory import Planned
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_json, read_object, write_json, write_text
from hfprune_dist.store.hashing import digest_of

Context = AnyContext[AnswersParameters]
# Numbers of examples, and the tokens before their responses.
Batch = list[tuple[int, list[int]]]
Answer = tuple[str, bool]  # and whether it was cut


def run(context: Context) -> None:
    """Write ``answers.jsonl``: pairs and chats with the model's answers, in the order of the text."""
    params, text, world = context.params, context.params.recovery, context.world
    checkpoint = open_checkpoint(context.input_path("model"))
    tokenizer = load_tokenizer(checkpoint.path)
    require_eos(tokenizer, checkpoint.path)
    examples, batches = _questions(context, tokenizer) if world.is_first else ([], {})
    missing = [(name, batch) for name, batch in batches.items() if read_object(context.work / name) is None]
    if rounds := world.broadcast(-(-len(missing) // world.size)):
        need = params.need(Planned(context.stage, {}, checkpoint, checkpointing=False))
        sharding = choose_sharding(context.runtime.sharding, need, world)
        model = FrozenModel(checkpoint, getattr(torch, params.dtype), text.answer_batch_size, sharding, world)
    for first in range(0, rounds * world.size, world.size):
        context.reporting("batches", len(batches))(len(batches) - len(missing) + first)
        for name, batch in world.broadcast(missing[first : first + world.size])[world.rank : world.rank + 1]:
            write_json(context.work / name, _answers(text, model, tokenizer, batch, seed=int(name[:8], 16)))
        model.join_idle_forwards()
    world.barrier()  # all ranks have written theirs
    draft = context.open_draft()

    def write() -> dict[str, int]:
        found = {int(number): answer for name in batches for number, answer in read_json(context.work / name).items()}
        records = [examples[number].answered(*answer) for number, answer in sorted(found.items()) if answer[0].strip()]
        if not records:
            raise UserError(
                f"recovery: of {len(examples)} instructions, {len(found)} leave room for answers, and the dense model "
                "gives none; raise sequence_length, lower answer_share, or set answers to given"
            )
        write_text(draft / ANSWERS, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))
        unfinished = sum(record[UNFINISHED] for record in records)
        return {"pairs": len(records), "dropped_pairs": len(examples) - len(records), "unfinished_pairs": unfinished}

    context.commit(draft, world.on_rank0(write))


def _questions(context: Context, tokenizer: Any) -> tuple[list[Example], dict[str, Batch]]:
    """All examples; and batches of those that leave an answer room, by the names of files for the answers."""
    text, path, seed = context.params.recovery, context.own_file("text"), context.params.seed
    examples = list(islice(read_examples(text.model_dump(), path, seed), text.samples))
    encoded = encode(tokenizer, examples, text.sequence_length - text.answer_tokens + 1)
    found = ((number, one.input_ids_T[: one.trained_T.argmax()].tolist()) for number, one in enumerate(encoded) if one)
    # The longest come first: memory runs out at once then, or never.
    asked = sorted(((number, ids) for number, ids in found if ids), key=lambda question: -len(question[1]))
    batches = [asked[first : first + text.answer_batch_size] for first in range(0, len(asked), text.answer_batch_size)]
    return examples, {f"{digest_of([seed, batch])[:20]}.json": batch for batch in batches}


def _answers(text: TrainingText, model: FrozenModel, tokenizer: Any, batch: Batch, seed: int) -> dict[int, Answer]:
    """Answer a batch."""
    module: Any = model.module
    eos, own = tokenizer.eos_token_id, module.generation_config.eos_token_id
    ends = {eos, *(own if isinstance(own, list) else [] if own is None else [own])}
    drawn = {"temperature": text.answer_temperature, "top_k": 0} if text.answer_temperature else {}
    options = {"eos_token_id": sorted(ends), "pad_token_id": eos, "max_new_tokens": text.answer_tokens, **drawn}
    module.generation_config = GenerationConfig(do_sample=bool(drawn), **options)  # without the checkpoint's penalties
    tokenizer.pad_token = tokenizer.eos_token
    prompts = tokenizer.pad({"input_ids": [ids for _, ids in batch]}, padding_side="left", return_tensors="pt")
    torch.manual_seed(seed)
    found_BT = module.generate(**prompts.to(model.world.device), use_cache=True)[:, prompts["input_ids"].shape[1] :]
    responses = [list(takewhile(lambda token: token not in ends, ids)) for ids in found_BT.tolist()]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    answers = zip(texts, (len(ids) == text.answer_tokens for ids in responses), strict=True)
    return {number: answer for (number, _), answer in zip(batch, answers, strict=True)}
