"""lm-eval's Hugging Face model, answering with all ranks of a world.

lm-eval runs only on rank 0 and sees a single process: there it builds the requests and scores the answers, which may
take minutes. The other ranks wait for batches of them to answer.

Choices of one question have the same context. It is read once, and each choice goes on from the cache; where a model's
cache can't be expanded, or a question has a single choice, context and choice are read together.

Batches don't depend on the number of ranks, and each is answered by one rank. Answers and scores therefore have the
same bits on any number of ranks, and a task may have fewer documents than there are ranks.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from hfprune_dist.core.devices import send
from hfprune_dist.core.memory_limits import LOGITS_BYTES
from hfprune_dist.data.tokenizer import append_nothing
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.lm_eval_tasks import explain
from hfprune_dist.kinds.memory import logits_bytes

# Batches of a task, if it has so many questions: work for several ranks.
WANTED_BATCHES = 8
# Tokens of padding that cost as much as a forward more.
WORTH_A_FORWARD = 32
# How often, at most, ranks wait for each other in a task.
MOST_ROUNDS = 256

# What lm-eval and transformers raise for a request that they can't put to the model.
_UNSUITABLE = (AssertionError, IndexError, TypeError, ValueError)

T = TypeVar("T")
Tokens = tuple[int, ...]
# Sequences with the same context, and its length; or one sequence alone, and its length.
Group = tuple[int, list[Tokens]]
# How many tokens of the sequences are read once for each context; the sequences; the continuations at the end of each.
Batch = tuple[int, Sequence[Tokens], Sequence[Sequence[list[int]]]]


class ModelError(Exception):
    """The model failed to answer; ``__cause__`` is the reason. Other errors inside lm-eval are those of a task."""


class ShardedLM(HFLM):  # type: ignore[misc]
    """An lm-eval model over a ``FrozenModel``, for use on rank 0 while all ranks ``run``; all ranks make it together.

    Attributes:
        task: name of the task that is being evaluated, on rank 0.
        report: called on rank 0 with how many batches of how many are answered.

    Args:
        tokenizer: the model's tokenizer.
        interruption: checked after every round of batches, on all ranks.
        batch_size: requests, or contexts that several requests share, per forward of one rank.
        add_bos_token: begin every sequence with BOS, if the tokenizer puts one before a text.
    """

    def __init__(
        self, model: FrozenModel, tokenizer: Any, interruption: Interruption, batch_size: int, add_bos_token: bool
    ) -> None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.pad_token  # which may have no row in the embedding
        append_nothing(tokenizer)
        super().__init__(
            pretrained=model.module,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=model.max_positions,  # lm-eval itself leaves out positions that rope scaling adds
            add_bos_token=add_bos_token,
        )
        self.task = ""
        self.report: Callable[[int, int], None] = lambda done, total: None
        self._device = model.world.device
        self._wants_bos = add_bos_token
        self._world = model.world
        self._interruption = interruption
        self._frozen = model
        self._most_rows = batch_size
        self._shares = model.cache_expands

    def run(self, work: Callable[[], T]) -> T:
        """Run work that asks this model on rank 0, and answer it with all ranks; return its result on every rank."""
        if self._world.is_first:
            result = work()
            self._world.broadcast(None)
            return self._world.broadcast(result)
        while (batches := self._world.broadcast(None)) is not None:
            self._answer_mine(*batches)
        return self._world.broadcast(None)  # type: ignore[return-value]

    # On rank 0: called by lm-eval.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        # Windows begin with BOS anyway; a second one would count as text to be predicted.
        self.add_bos_token, self.batch_size_per_gpu = False, 2**31  # all windows in one call
        try:
            return list(super().loglikelihood_rolling(requests, disable_tqdm=True))
        finally:
            self.add_bos_token, self.batch_size_per_gpu = self._wants_bos, self._most_rows

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether it is the most likely text."""
        asked: dict[Tokens, list[int]] = defaultdict(list)  # what is read -> requests about how it continues
        for number, (_, context, continuation) in enumerate(requests):
            asked[tuple((context + continuation)[-self.max_length - 1 : -1])].append(number)
        questions: dict[Tokens, list[Tokens]] = defaultdict(list)  # context -> sequences that begin with it
        for tokens, numbers in asked.items():
            longest = max(len(requests[number][2]) for number in numbers)
            questions[tokens[: max(0, len(tokens) + 1 - longest)]].append(tokens)
        model: Any = self._frozen.module
        most_tokens = LOGITS_BYTES // (model.config.get_text_config().vocab_size * logits_bytes(model.dtype.itemsize))
        cut = list(cut_questions(questions, self._shares, self._most_rows, most_tokens))
        batches = [
            (shared, sequences, [[requests[number][2] for number in asked[tokens]] for tokens in sequences])
            for shared, sequences in cut
        ]
        places = [[number for tokens in sequences for number in asked[tokens]] for _, sequences in cut]
        answers = self._ask("loglikelihood", batches, places)
        if any(math.isnan(value) for value, _ in answers):
            error = UserError("loglikelihood: the model's log-likelihoods are NaN; check the checkpoint's weights")
            raise ModelError from error
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        # Longest first, so that memory runs out at once or never.
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number].args[0]))
        size = min(self._most_rows, math.ceil(len(requests) / WANTED_BATCHES))
        places = [order[first : first + size] for first in range(0, len(order), size)]
        batches = [[requests[number].args for number in numbers] for numbers in places]
        return self._ask("generate_until", batches, places)

    def _ask(self, method: str, batches: Sequence[Any], places: Sequence[Sequence[int]]) -> list[Any]:
        """Have all ranks answer batches, a few at a time; ``places`` are those of their requests' answers."""
        answers: list[Any] = [None] * sum(map(len, places))
        ranks = self._world.size
        size = ranks * math.ceil(len(batches) / (ranks * MOST_ROUNDS))
        try:
            for first in range(0, len(batches), size):
                self.report(first, len(batches))
                now = self._world.broadcast((self.task, method, first, batches[first : first + size]))
                for number, found in self._answer_mine(*now).items():
                    for place, answer in zip(places[number], found, strict=True):
                        answers[place] = answer
            self.report(len(batches), len(batches))
        except Exception as error:
            raise ModelError(f"{method}: {error}") from error
        return answers

    # On all ranks.

    def _answer_mine(self, task: str, method: str, first: int, batches: Sequence[Any]) -> dict[int, list[Any]]:
        """Answer this rank's batches; return all answers by number. What can't be answered is refused."""
        self._interruption.stop_if_agreed(self._world)
        answer: Callable[..., list[Any]] = self._score if method == "loglikelihood" else self._generate
        mine = {}
        try:
            for index in range(self._world.rank, len(batches), self._world.size):
                mine[first + index] = answer(first + index, batches[index])
        except _UNSUITABLE as error:
            reader = f"{method}, by a model that reads {self.max_length} tokens"
            raise UserError(f"task {task!r} can't be evaluated: {reader}: {explain(error)}") from error
        self._frozen.join_idle_forwards()
        return {number: found for theirs in self._world.all_gather(mine) for number, found in theirs.items()}

    def _generate(self, number: int, batch: Sequence[tuple[Any, ...]]) -> list[str]:
        """Have lm-eval's own code answer; sampling, if any, is seeded with the batch's number."""
        torch.manual_seed(number)
        requests = [Instance("generate_until", {}, arguments, index) for index, arguments in enumerate(batch)]
        return list(super().generate_until(requests, disable_tqdm=True))

    def _score(self, _number: int, batch: Batch) -> list[tuple[float, bool]]:
        """For each continuation of each sequence, its log-likelihood, and whether each token is the most likely one."""
        shared, sequences, continuations = batch
        for tokens, them in zip(sequences, continuations, strict=True):
            assert all(0 < len(ids) <= len(tokens) for ids in them), "a context or continuation is empty or too long"
        starts = list(dict.fromkeys(tokens[:shared] for tokens in sequences))
        start_of = {start: index for index, start in enumerate(starts)}
        cache = None
        if shared:
            _, cache = self._frozen.logits_at(torch.tensor(starts), torch.tensor([], dtype=torch.int64))
        answers: dict[int, list[tuple[float, bool]]] = {}
        by_length = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
        slices = cut_where_it_pays([len(sequences[row]) for row in by_length])
        for some in slices:
            rows = by_length[some]
            own = cache if some is slices[-1] else copy.deepcopy(cache)  # which is extended
            if own is not None:
                chosen = [start_of[sequences[row][:shared]] for row in rows]
                own.batch_select_indices(send(torch.tensor(chosen), self.device))
            rest = [torch.tensor(sequences[row][shared:]) for row in rows]
            # Padding comes after a sequence, so it changes nothing before.
            input_ids_BT = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True)
            scored = [max(map(len, continuations[row])) for row in rows]
            ends = [place * input_ids_BT.shape[1] + len(ids) for place, ids in enumerate(rest)]
            places_N = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, scored, strict=True)])
            logits_NV, _ = self._frozen.logits_at(input_ids_BT, places_N, own, shared)
            found = _log_likelihoods(logits_NV, scored, [continuations[row] for row in rows])
            answers |= zip(rows, found, strict=True)
        return [answer for row in range(len(sequences)) for answer in answers[row]]


def _log_likelihoods(
    logits_NV: Tensor, scored: Sequence[int], continuations: Sequence[Sequence[list[int]]]
) -> list[list[tuple[float, bool]]]:
    """For each sequence, of which ``scored`` logits are there, the answers for continuations that end with it."""
    ends = zip(itertools.accumulate(scored), continuations, strict=True)
    asked = [(end, ids) for end, of_sequence in ends for ids in of_sequence]
    places_M = torch.cat([torch.arange(end - len(ids), end) for end, ids in asked])
    ids_M = torch.tensor([token for _, ids in asked for token in ids])
    places_M, ids_M = send(torch.stack([places_M, ids_M]), logits_NV.device)
    log_p_M = logits_NV.float().log_softmax(dim=-1)[places_M, ids_M]
    is_best_M = logits_NV.argmax(dim=-1)[places_M] == ids_M
    seen_2M = torch.stack([log_p_M, is_best_M.float()]).cpu()  # once: a GPU waits while the host reads
    parts = iter(seen_2M.split([len(ids) for _, ids in asked], dim=1))
    grouped = [list(itertools.islice(parts, len(of_sequence))) for of_sequence in continuations]
    return [
        [(float(log_p_T.sum()), bool(is_best_T.all())) for log_p_T, is_best_T in of_sequence] for of_sequence in grouped
    ]


def cut_where_it_pays(lengths: Sequence[int], first: int = 0) -> list[slice]:
    """Cut sequences, longest first, into slices padded to their longest, where the tokens saved outweigh a forward."""
    rows = len(lengths)
    saved, cut = max(((rows - cut) * (lengths[0] - lengths[cut]), cut) for cut in range(rows))
    if saved < WORTH_A_FORWARD:
        return [slice(first, first + rows)]
    return cut_where_it_pays(lengths[:cut], first) + cut_where_it_pays(lengths[cut:], first + cut)


def cut_questions(
    questions: Mapping[Tokens, list[Tokens]], shares: bool, batch_size: int, most_tokens: int
) -> list[tuple[int, list[Tokens]]]:
    """Cut questions into batches of similar length; the largest come first, so that memory runs out at once or never.

    Args:
        questions: context -> sequences that begin with it.
        shares: whether sequences with the same context can share its forward.
        most_tokens: of a batch, padding included, if it has more than one sequence.

    Returns:
        For each batch, how many tokens of its sequences are read once for each context, and the sequences.
    """
    sharing: list[Group] = []
    alone: list[Group] = []
    for context, sequences in questions.items():
        if shares and len(sequences) > 1 < len(context) and _padded(sequences) <= most_tokens:
            sharing.append((len(context), sequences))
        else:
            alone += [(len(tokens), [tokens]) for tokens in sequences]
    found: list[tuple[int, list[Tokens]]] = []
    for groups in (sharing, alone):
        size = min(batch_size, math.ceil(len(groups) / WANTED_BATCHES))
        batches: list[list[Group]] = []
        for group in sorted(groups, reverse=True):
            together = [*batches.pop(), group] if batches else [group]
            is_similar = group[0] >= together[0][0] * 7 // 8
            fits = is_similar and len(together) <= size and _padded(_sequences(together)) <= most_tokens
            batches += [together] if fits or len(together) == 1 else [together[:-1], [group]]
        # The last token of a context is read with each continuation, of which it predicts the first token.
        found += [(batch[-1][0] - 1 if groups is sharing else 0, _sequences(batch)) for batch in batches]
    return sorted(found, key=lambda batch: -_padded(batch[1]))


def _sequences(groups: Sequence[Group]) -> list[Tokens]:
    return [tokens for _, sequences in groups for tokens in sequences]


def _padded(sequences: Sequence[Tokens]) -> int:
    """Tokens of a batch in which all are as long as the longest."""
    return len(sequences) * max(map(len, sequences))
