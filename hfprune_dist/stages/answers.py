"""Answers: the dense model's responses to instructions, in place of those that a text holds.

Instructions are cut into batches, the same on any number of ranks. One rank answers a batch and keeps that in the work
folder: a killed stage goes on with the batches that are missing.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.training import TrainingText
from hfprune_dist.data.examples import read_examples
from hfprune_dist.data.instructions import EXAMPLES_AT_ONCE, questions
from hfprune_dist.data.tokenizer import load_tokenizer, require_eos
from hfprune_dist.distributed.frozen_model import FrozenModel, choose_sharding
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.answers import ANSWERS, AnswersParameters
from hfprune_dist.kinds.memory import Planned
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_json, read_object, write_json, write_text
from hfprune_dist.store.hashing import digest_of

Context = AnyContext[AnswersParameters]
# Numbers of records, and the tokens of their questions.
Batch = list[tuple[int, list[int]]]
Answer = dict[str, Any]  # a line of the file


def run(context: Context) -> None:
    """Write ``answers.jsonl``: the tokens of questions and of the model's answers, with the one that ends an answer, in
    the order of the text; none is tokenized again, so that training reads what the model said.
    """
    params, text, world = context.params, context.params.recovery, context.world
    checkpoint = open_checkpoint(context.input_path("model"))
    tokenizer = load_tokenizer(checkpoint.path)
    require_eos(tokenizer, checkpoint.path)
    asked, batches = _batches(context, tokenizer) if world.is_first else (0, {})
    missing = [(name, batch) for name, batch in batches.items() if read_object(context.work / name) is None]
    if rounds := world.broadcast(-(-len(missing) // world.size)):
        need = params.need(Planned(context.stage, {}, checkpoint, checkpointing=False))
        sharding = choose_sharding(context.runtime.sharding, need, world)
        model = FrozenModel(checkpoint, getattr(torch, params.dtype), text.answer_batch_size, sharding, world)
    for first in range(0, rounds * world.size, world.size):
        context.reporting("batches", len(batches))(len(batches) - len(missing) + first)
        mine = world.broadcast(missing[first : first + world.size])[world.rank : world.rank + 1]
        answers = [_answers(text, model, tokenizer, batch, seed=int(name[:8], 16)) for name, batch in mine]
        model.join_idle_forwards()
        world.on_rank0(context.require_untouched_inputs)
        for (name, _), found in zip(mine, answers, strict=True):
            write_json(context.work / name, found)
    world.barrier()  # all ranks have written theirs
    draft = context.open_draft()

    def write() -> dict[str, int]:
        found = {int(number): answer for name in batches for number, answer in read_json(context.work / name).items()}
        records = [found[number] for number in sorted(found) if found[number]["response"].strip()]
        if not records:
            raise UserError(
                f"recovery: of {asked} instructions, {len(found)} leave room for answers, and the dense model gives "
                "none; raise sequence_length, lower answer_share, or set answers to given"
            )
        write_text(draft / ANSWERS, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))
        unfinished = sum(record["unfinished"] for record in records)
        return {"pairs": len(records), "dropped_pairs": asked - len(records), "unfinished_pairs": unfinished}

    context.commit(draft, world.on_rank0(write))


def _batches(context: Context, tokenizer: Any) -> tuple[int, dict[str, Batch]]:
    """The number of instructions; and batches of those that leave an answer room, by names of files for the answers."""
    text, path, seed = context.params.recovery, context.own_file("text"), context.params.seed
    examples = islice(read_examples(text.model_dump(), path, seed), text.samples)
    found: Batch = []
    count = 0
    while some := list(islice(examples, EXAMPLES_AT_ONCE)):
        asked = enumerate(questions(tokenizer, some, text.sequence_length - text.answer_tokens), start=count)
        found += [(number, ids) for number, ids in asked if ids]
        count += len(some)
        context.progress.update("tokenizing", count, text.samples or count)
    # The longest come first: memory runs out at once then, or never.
    found.sort(key=lambda question: -len(question[1]))
    batches = [found[first : first + text.answer_batch_size] for first in range(0, len(found), text.answer_batch_size)]
    return count, {f"{digest_of([seed, batch])[:20]}.json": batch for batch in batches}


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
    answers: dict[int, Answer] = {}
    for (number, asked), ids in zip(batch, found_BT.tolist(), strict=True):
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        answers[number] = {
            "prompt": tokenizer.decode(asked),
            "response": tokenizer.decode(ids[:length], skip_special_tokens=True),
            "prompt_ids": asked,
            "response_ids": ids[: length + 1],
            "unfinished": length == text.answer_tokens,
        }
    return answers
