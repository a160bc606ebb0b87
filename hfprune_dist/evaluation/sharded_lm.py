"""lm-eval's Hugging Face model, answering with all ranks of a world.

lm-eval runs only on rank 0 and sees a single process: there it builds the requests and scores the answers, which may
take minutes. The other ranks wait for requests to answer with it.

Requests are cut into chunks that don't depend on the number of ranks, and each chunk is answered by one rank. Answers
and scores therefore have the same bits on any number of ranks, and a task may have fewer documents than there are
ranks.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hfprune_dist.core.memory_limits import LOGITS_BYTES
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.lm_eval_tasks import explain
from hfprune_dist.kinds.memory import logits_bytes

# Maximum number of batches per chunk. Single-letter choices share a forward if they are in the same chunk; several
# batches per chunk keep them together.
CHUNK_BATCHES = 4
# Chunks per task, as long as batches stay whole: ranks wait for each other after each, and the last ones may get none.
WANTED_CHUNKS = 64

# What lm-eval and transformers raise, before a forward, for a request that they can't put to the model.
_UNSUITABLE = (AssertionError, IndexError, TypeError, ValueError)

T = TypeVar("T")
Arguments = tuple[Any, ...]
# (name of the task, name of the model's method, index of the chunk, arguments of its requests)
Chunk = tuple[str, str, int, list[Arguments]]


class ModelError(Exception):
    """The model failed to answer; ``__cause__`` is the reason. Other errors inside lm-eval are those of a task."""


class ShardedLM(HFLM):  # type: ignore[misc]
    """An lm-eval model over a ``FrozenModel``, for use on rank 0 while all ranks ``run``.

    Attributes:
        task: name of the task that is being evaluated, on rank 0.
        report: called on rank 0 with how many requests of how many are answered.

    Args:
        tokenizer: the model's tokenizer; its ``add_bos_token`` is set.
        interruption: checked after every round of chunks, on all ranks.
        batch_size: requests per forward of one rank.
        add_bos_token: begin every sequence with BOS, if the tokenizer has one.
    """

    def __init__(
        self,
        model: FrozenModel,
        tokenizer: Any,
        interruption: Interruption,
        batch_size: int,
        add_bos_token: bool,
    ) -> None:
        if tokenizer.bos_token_id is not None:
            tokenizer.add_bos_token = add_bos_token  # some tokenizers add none unless told so
        super().__init__(
            pretrained=model.module,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=model.max_positions,  # lm-eval itself leaves out positions that rope scaling adds
            add_bos_token=add_bos_token,
            softmax_dtype=torch.float32,  # summed over a document, bfloat16 keeps no more than three digits
        )
        self.task = ""
        self.report: Callable[[int, int], None] = lambda done, total: None
        self._device = model.world.device
        self._wants_bos = add_bos_token
        self._world = model.world
        self._interruption = interruption
        self._frozen = model

    def run(self, work: Callable[[], T]) -> T:
        """Run work that asks this model on rank 0, and answer it with all ranks; return its result on every rank."""
        if self._world.is_first:
            result = work()
            self._world.broadcast(None)
            return self._world.broadcast(result)
        while (chunks := self._world.broadcast(None)) is not None:
            self._answer_mine(chunks)
        return self._world.broadcast(None)  # type: ignore[return-value]

    # On rank 0: called by lm-eval.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return [(float(value), bool(greedy)) for value, greedy in self._ask("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._ask("generate_until", requests)

    def _ask(self, method: str, requests: list[Instance]) -> list[Any]:
        """Have all ranks answer requests, each one chunk at a time."""
        try:
            return self._ask_all_ranks(method, [tuple(request.args) for request in requests])
        except Exception as error:
            raise ModelError(f"{method}: {error}") from error

    def _ask_all_ranks(self, method: str, requests: list[Arguments]) -> list[Any]:
        # Longest first, so that memory runs out at once or never; identical prompts next to each other.
        lengths = [-sum(len(part) for part in arguments if isinstance(part, str)) for arguments in requests]
        order = sorted(range(len(requests)), key=lambda index: (lengths[index], str(requests[index][0])))
        size, ranks = chunk_size(method, len(requests), self.batch_size), self._world.size
        places = [order[start : start + size] for start in range(0, len(order), size)]
        answers: list[Any] = [None] * len(requests)
        for first in range(0, len(places), ranks):
            self.report(first * size, len(requests))
            now = range(first, min(first + ranks, len(places)))
            chunks = [(self.task, method, number, [requests[index] for index in places[number]]) for number in now]
            for number, of_chunk in zip(now, self._answer_mine(self._world.broadcast(chunks)), strict=True):
                for index, answer in zip(places[number], of_chunk, strict=True):
                    answers[index] = answer
        self.report(len(requests), len(requests))
        # A log-likelihood comes alone, or with whether its text is the most likely one.
        values = [answer[0] if isinstance(answer, list | tuple) else answer for answer in answers]
        if any(isinstance(value, float) and math.isnan(value) for value in values):
            raise UserError(f"{method}: the model's log-likelihoods are NaN; check the checkpoint's weights")
        return answers

    # On all ranks.

    def _answer_mine(self, chunks: list[Chunk]) -> list[list[Any]]:
        """Answer this rank's chunk, if it has one; return the answers to all chunks."""
        self._interruption.stop_if_agreed(self._world)
        answers = self._answer(*chunks[self._world.rank]) if self._world.rank < len(chunks) else []
        self._frozen.join_idle_forwards()
        return self._world.all_gather(answers)[: len(chunks)]

    def _answer(self, task: str, method: str, number: int, arguments: list[Arguments]) -> list[Any]:
        """Have lm-eval's own code answer a chunk; sampling, if any, is seeded with the chunk's number.

        Raises:
            UserError: for a request that no model, or not this one, can answer: too long, or with unknown options.
        """
        torch.manual_seed(number)
        requests = [Instance(method, {}, args, index) for index, args in enumerate(arguments)]
        try:
            # Rolling windows begin with BOS anyway; a second one would count as text to be predicted.
            self.add_bos_token = self._wants_bos and method != "loglikelihood_rolling"
            answers: list[Any] = getattr(super(), method)(requests, disable_tqdm=True)
        except _UNSUITABLE as error:
            # Of a bare assertion, all that is known is its line.
            reason = explain(error) if str(error) else f"{traceback.extract_tb(error.__traceback__)[-1].line} fails"
            raise UserError(
                f"task {task!r} can't be evaluated: {method}, by a model that reads {self.max_length} tokens: {reason}"
            ) from error
        finally:
            self.add_bos_token = self._wants_bos
        return answers

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        """Answer long requests in smaller batches, of logits that fit ``LOGITS_BYTES``: the same on any machine."""
        batch_size: int = self.batch_size
        model: Any = self._frozen.module
        longest = max((len(prompt) + len(answer) for _, prompt, answer in requests), default=1)
        of_a_token = model.config.get_text_config().vocab_size * logits_bytes(model.dtype.itemsize)
        self.batch_size_per_gpu = min(batch_size, max(1, LOGITS_BYTES // (longest * of_a_token)))
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        finally:
            self.batch_size_per_gpu = batch_size


def chunk_size(method: str, requests: int, batch_size: int) -> int:
    """Requests per chunk of a task; independent of the number of ranks, so that answers always have the same bits.

    A chunk has whole batches; for rolling log-likelihoods a document counts as a batch, since it has many windows.
    """
    unit = 1 if method == "loglikelihood_rolling" else batch_size
    return min(-(-requests // (WANTED_CHUNKS * unit)) * unit, CHUNK_BATCHES * batch_size)
