"""Answers: the dense model's responses to instructions, in place of those that a text holds.

Instructions are cut into batches, the same on any number of ranks. One rank answers a batch, by transformers or in
vLLM, and keeps that in the work folder: a killed stage goes on with the batches that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.engines import fit
from hfprune_dist.config.training import TrainingText
from hfprune_dist.data.examples import read_examples
from hfprune_dist.data.instructions import EXAMPLES_AT_ONCE, questions
from hfprune_dist.data.tokenizer import load_tokenizer, require_eos
from hfprune_dist.distributed.frozen_model import FrozenModel, choose_sharding, gpus_here, placement_here
from hfprune_dist.engines.check import trusts
from hfprune_dist.engines.process import runs_of
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.answers import ANSWERS, AnswersParameters
from hfprune_dist.kinds.memory import ITEMSIZE, generation, passes
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_json, read_object, write_json, write_jsonl
from hfprune_dist.store.hashing import digest_of

Context = AnyContext[AnswersParameters]
# Numbers of records, and the tokens of their questions.
Batch = list[tuple[int, list[int]]]
Batches = Sequence[tuple[str, Batch]]  # with names of files for the answers
Answers = tuple[str, list[list[int]]]  # what answered, and the tokens of each answer
Answerer = Callable[[Batches], Answers]
BATCH = 32  # instructions
# Instructions in vLLM at a time; and batches between its starts, each of which takes a minute: more than a few would be
# hours of a CPU's work, which is lost if the stage is killed.
AT_ONCE_IN_VLLM, BATCHES_OF_VLLM = 256, {"cuda": 128, "cpu": 8}


def run(context: Context) -> None:
    """Write ``answers.jsonl``: the tokens of questions and of the model's answers, with the one that ends an answer, in
    the order of the text; none is tokenized again, so that training reads what the model said.
    """
    world = context.world
    checkpoint = open_checkpoint(context.input_path("model"))
    tokenizer = load_tokenizer(checkpoint.path)
    require_eos(tokenizer, checkpoint.path)
    own = (read_object(checkpoint.path / "generation_config.json") or checkpoint.config).get("eos_token_id")
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}
    asked, batches = _batches(context, tokenizer) if world.is_first else (0, {})
    missing = [(name, batch) for name, batch in batches.items() if read_object(context.work / name) is None]
    if count := world.broadcast(len(missing)):
        at_once, answer = _answerer(context, checkpoint, tokenizer, sorted(ends))
        for first in range(0, count, at_once * world.size):
            context.reporting("batches", len(batches))(len(batches) - count + first)
            mine = world.broadcast(missing[first : first + at_once * world.size])[world.rank :: world.size]
            engine, found = answer(mine)
            answers = iter(found)
            world.on_rank0(context.require_untouched_inputs)
            for name, batch in mine:
                records = {number: _record(tokenizer, ids, next(answers), ends) for number, ids in batch}
                write_json(context.work / name, {"engine": engine, "records": records})
    world.barrier()  # all ranks have written theirs
    draft = context.open_draft()

    def write() -> dict[str, Any]:
        kept = [read_json(context.work / name) for name in batches]
        found = {int(number): record for each in kept for number, record in each["records"].items()}
        records = [found[number] for number in sorted(found) if found[number]["response"].strip()]
        if not records:
            raise UserError(
                f"recovery: of {asked} instructions, {len(found)} leave room for answers, and the dense model gives "
                "none; raise sequence_length, or set answers to given"
            )
        write_jsonl(draft / ANSWERS, records)
        counts = {"pairs": len(records), "dropped_pairs": asked - len(records)}
        counts["unfinished_pairs"] = sum(record["unfinished"] for record in records)
        return {**counts, "engine": ", ".join(sorted({each["engine"] for each in kept}))}

    context.commit(draft, world.on_rank0(write))


def _batches(context: Context, tokenizer: Any) -> tuple[int, dict[str, Batch]]:
    """The number of instructions; and batches of those that leave an answer room, by names of files for the answers."""
    text, path, seed = context.params.recovery, context.input_if_any("text"), context.params.seed
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
    batches = (found[first : first + BATCH] for first in range(0, len(found), BATCH))
    return count, {f"{digest_of([seed, batch])[:20]}.json": batch for batch in batches}


def _answerer(context: Context, checkpoint: Checkpoint, tokenizer: Any, ends: list[int]) -> tuple[int, Answerer]:
    """How many batches a rank answers before they are kept, and what answers: vLLM if there is one that loads the
    model, and a rank has the memory for all of it. Collective.
    """
    params, world, sharding = context.params, context.world, context.runtime.sharding
    tokens, itemsize = params.recovery.sequence_length, ITEMSIZE[params.dtype]
    need = partial(generation, checkpoint, tokens=tokens, itemsize=itemsize)
    gpus, told = gpus_here(world), ""
    if "vllm" in context.runtime.engine_pythons:
        rows = passes(need, "auto", AT_ONCE_IN_VLLM, gpus, sharding).at_once
        placed, in_vllm = placement_here(need(rows), sharding, world), fit("vllm", checkpoint.config)
        if in_vllm.loads and placed.whole and placed.fits:
            cache = int(need(rows).activations)
            options = {"max_num_seqs": rows, "kv_cache_memory_bytes": cache, **in_vllm.options}
            return BATCHES_OF_VLLM[world.device.type], partial(_in_vllm, context, checkpoint.path, ends, options)
        lacks = "a rank lacks the memory for the whole model"
        told = f", since {lacks if in_vllm.loads else f'vllm would not load the model: {in_vllm.told}'}"
    if world.is_first:
        print(f"answers: by transformers{told}", flush=True)
    rows = passes(need, "auto", BATCH, gpus, sharding).at_once
    placed_as = choose_sharding(sharding, need(rows), world)
    model = FrozenModel(checkpoint, getattr(torch, params.dtype), placed_as, world)
    return 1, partial(_in_transformers, params.recovery, model, tokenizer, ends, rows)


def _in_transformers(
    text: TrainingText, model: FrozenModel, tokenizer: Any, ends: list[int], rows: int, batches: Batches
) -> Answers:
    """Answer batches, so many instructions at once."""
    found: list[list[int]] = []
    tokenizer.pad_token = tokenizer.eos_token
    drawn = {"temperature": text.answer_temperature, "top_k": 0} if text.answer_temperature else {}
    options = {"eos_token_id": ends, "pad_token_id": tokenizer.eos_token_id, "max_new_tokens": text.answer_tokens}
    module: Any = model.module  # whose own configuration may have penalties
    module.generation_config = GenerationConfig(do_sample=bool(drawn), **options, **drawn)
    for name, batch in batches:
        torch.manual_seed(int(name[:8], 16))
        for first in range(0, len(batch), rows):
            asked = {"input_ids": [ids for _, ids in batch[first : first + rows]]}
            prompts = tokenizer.pad(asked, padding_side="left", return_tensors="pt").to(model.world.device)
            found += module.generate(**prompts, use_cache=True)[:, prompts["input_ids"].shape[1] :].tolist()
    model.join_idle_forwards()
    return f"transformers {transformers.__version__}", found


def _in_vllm(context: Context, model: Path, ends: list[int], options: Mapping[str, Any], batches: Batches) -> Answers:
    """Answer batches in a process of vLLM's, on the rank's GPU."""
    text = context.params.recovery
    drawn = {"temperature": text.answer_temperature, "max_tokens": text.answer_tokens, "stop_token_ids": ends}
    loader = {"model": str(model), "trust_remote_code": trusts(model), "max_model_len": text.sequence_length}
    request = {
        "options": {**loader, "dtype": context.params.dtype, **options},
        "prompts": [ids for _, batch in batches for _, ids in batch],
        "seeds": [int(name[:8], 16) + number for name, batch in batches for number, _ in batch],
        "sampling": drawn,
    }
    return runs_of("vllm", context.runtime.python_of("vllm"), context.work, request) if batches else ("", [])


def _record(tokenizer: Any, asked: list[int], said: list[int], ends: set[int]) -> dict[str, Any]:
    """A line of the file."""
    length = next((place for place, token in enumerate(said) if token in ends), len(said))
    return {
        "prompt": tokenizer.decode(asked),
        "response": tokenizer.decode(said[:length], skip_special_tokens=True),
        "prompt_ids": asked,
        "response_ids": said[: length + 1],
        "unfinished": length == len(said),
    }
