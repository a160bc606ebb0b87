"""How a task's requests are cut into chunks for ranks to share, and messages to ranks that wait for lm-eval."""

import errno
import os
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from lm_eval.api.instance import Instance
from ranks import SoloWorld
from tiny import save_tiny
from worlds import Ranks, until_told

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation import sharded_lm
from hfprune_dist.evaluation.sharded_lm import CHUNK_BATCHES, WANTED_CHUNKS, AnswerLog, ShardedLM, chunk_size
from hfprune_dist.store.claims import ClaimLostError

BATCH = 16


@pytest.mark.parametrize(
    ("method", "requests", "size"),
    [
        ("loglikelihood", 1, BATCH),
        ("loglikelihood", 240, BATCH),
        ("loglikelihood", WANTED_CHUNKS * BATCH, BATCH),
        ("generate_until", WANTED_CHUNKS * BATCH + 1, 2 * BATCH),
        ("loglikelihood", 1_000_000, CHUNK_BATCHES * BATCH),
        ("loglikelihood_rolling", 2, 1),
        ("loglikelihood_rolling", WANTED_CHUNKS + 1, 2),
        ("loglikelihood_rolling", 1_000_000, CHUNK_BATCHES * BATCH),
    ],
)
def test_small_tasks_make_many_chunks_and_large_ones_large_chunks(method, requests, size):
    assert chunk_size(method, requests, BATCH) == size


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_that_wait_for_lm_eval_hear_that_it_is_at_work(tmp_path, monkeypatch, size):
    """lm-eval works before and after its requests, each time until the others have been told twice."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))
    monkeypatch.setattr(sharded_lm, "TELL_EVERY_S", 0.001)
    ranks = Ranks(size)
    at_work = until_told(ranks, lambda: None)

    def work(world):
        model = FrozenModel(checkpoint, torch.float32, 2, "replicate", world)
        lm = ShardedLM(model, load_tokenizer(checkpoint.path), Interruption(), 2, True)

        def ask():
            at_work()
            with lm.task(AnswerLog(tmp_path / "log"), lambda _done, _total: None):
                requests = [Instance("loglikelihood", {}, ("a b", f" {word}"), 0) for word in "cdefghi"]
                answers = lm.loglikelihood(requests)
            at_work()
            return answers

        answers, told = lm.run(ask), len(ranks.logs[0])
        time.sleep(0.01)
        assert len(ranks.logs[0]) == told, "nothing is told any more"
        return answers

    (answers, *others) = ranks.run(work)
    assert len(answers) == 7 and len(set(answers)) > 1 and others == [answers] * (size - 1)


def test_a_task_that_fails_leaves_no_log_for_the_next(tmp_path):
    lm = object.__new__(ShardedLM)
    with (
        pytest.raises(ValueError, match="a task of others"),
        lm.task(AnswerLog(tmp_path / "log"), lambda _done, _total: None),
    ):
        raise ValueError("a task of others")
    with pytest.raises(sharded_lm.ModelError) as refusal:
        lm.loglikelihood([])
    assert isinstance(refusal.value.__cause__, AssertionError), "there is no log, rather than that of another task"


def test_nobody_is_told_of_work_that_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_lm, "TELL_EVERY_S", 0.001)
    checkpoint, ranks = open_checkpoint(save_tiny(tmp_path / "model")), Ranks(1)

    def work(world):
        model = FrozenModel(checkpoint, torch.float32, 2, "replicate", world)
        lm = ShardedLM(model, load_tokenizer(checkpoint.path), Interruption(), 2, True)

        def fail():
            assert tellers() == 1
            raise ValueError("a task of others")

        lm.run(fail)

    # By name, because libraries that load a model leave threads of their own behind.
    def tellers():
        return sum(thread.name == sharded_lm.TELLER for thread in threading.enumerate())

    with pytest.raises(ValueError, match="a task of others"):
        ranks.run(work)
    assert tellers() == 0


def test_nobody_is_told_anything_once_rank_0_has_failed_to_answer(tmp_path, monkeypatch):
    """The others wait for answers while the notifying thread waits for its turn, which it must not take."""
    monkeypatch.setattr(sharded_lm, "TELL_EVERY_S", 0.001)
    checkpoint, ranks = open_checkpoint(save_tiny(tmp_path / "model")), Ranks(2)
    told = []

    def work(world):
        model = FrozenModel(checkpoint, torch.float32, 2, "replicate", world)
        lm = ShardedLM(model, load_tokenizer(checkpoint.path), Interruption(), 2, True)

        def fail(*_):
            time.sleep(0.1)  # by then, the thread waits
            told.append(len(ranks.logs[0]))
            raise MemoryError("no room for a chunk")

        def ask():
            monkeypatch.setattr(lm, "_answer", fail)
            with lm.task(AnswerLog(tmp_path / "log"), lambda _done, _total: None):
                try:
                    lm.loglikelihood([Instance("loglikelihood", {}, ("a b", " c"), 0)] * 4)
                finally:
                    time.sleep(0.1)
                    told.append(len(ranks.logs[0]))

        lm.run(ask)

    with pytest.raises(sharded_lm.ModelError, match="no room for a chunk"):
        ranks.run(work)
    before, after = told
    assert after == before


UNSUITABLE = {
    "longer than the model reads": ("loglikelihood", ("a b", " long" * 200), "continuation_enc.*max_length"),
    "nothing after nothing": ("loglikelihood", ("", ""), "IndexError"),
    "as long an answer as the model reads": ("generate_until", ("a b", {"max_gen_toks": 512}), "512.*must be less"),
    "an option that there isn't": ("generate_until", ("a b", {"max_gen_toks": 2, "tempo": 1}), "not used.*tempo"),
}


@pytest.mark.parametrize("what", UNSUITABLE)
@pytest.mark.parametrize(("size", "place"), [(1, 2), (3, 0), (3, 4)])
def test_a_request_that_cannot_be_answered_is_an_error_of_the_task_and_leaves_all_ranks_in_step(
    tmp_path, what, size, place
):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))
    method, unsuitable, message = UNSUITABLE[what]
    usual = {"loglikelihood": ("a b", " c"), "generate_until": ("a b", {"max_gen_toks": 2})}[method]
    requests = [Instance(method, {}, usual, number) for number in range(5)]
    mixed = [*requests[:place], Instance(method, {}, unsuitable, place), *requests[place + 1 :]]

    def work(world):
        model = FrozenModel(checkpoint, torch.float32, 1, "replicate", world)
        lm = ShardedLM(model, load_tokenizer(checkpoint.path), Interruption(), 1, True)

        def ask():
            with lm.task(AnswerLog(tmp_path / "log"), lambda _done, _total: None):
                with pytest.raises(sharded_lm.RequestError, match=f"{method}.*{message}"):
                    getattr(lm, method)(mixed)
                return getattr(lm, method)(requests)

        return len(lm.run(ask))

    assert Ranks(size).run(work) == [len(requests)] * size


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the log")
ENDS = {
    "a task": (UserError("no such task"), "no such task"),
    "its log": (FULL, "the log: No space left on device; make room"),
    "the heartbeat": (ClaimLostError("taken over"), "taken over"),
    "the model": (UserError("not supported"), "not supported"),
    "the first rank's disk": (FULL, "the log: No space left on device; make room"),
    "the last rank's disk": (FULL, "the log: No space left on device; make room"),
}


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("what", ENDS)
def test_what_fails_on_one_rank_ends_all_of_them_in_order(tmp_path, what, size, listens):
    """Whether ranks also ask each other, after each round, if one was asked to end."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))
    error, message = ENDS[what]
    requests = [Instance("loglikelihood", {}, ("a b", " c"), number) for number in range(5)]

    def work(world):
        model = FrozenModel(checkpoint, torch.float32, 1, "replicate", world)
        interruption = Interruption()
        interruption._listening = listens
        lm = ShardedLM(model, load_tokenizer(checkpoint.path), interruption, 1, True)
        log, report = AnswerLog(tmp_path / "log"), lambda _done, _total: None

        def fail(*_):
            raise error

        if what == "its log":
            log.add = fail
        elif what == "the heartbeat":
            report = fail
        elif (what in ("the model", "the last rank's disk") and world.rank == world.size - 1) or (
            what == "the first rank's disk" and world.is_first
        ):
            lm._answer = fail

        def ask():
            if what == "a task":
                fail()
            with lm.task(log, report):
                try:
                    lm.loglikelihood(requests)
                except sharded_lm.ModelError as failure:
                    raise failure.__cause__ from None

        with pytest.raises((UserError, ClaimLostError), match=message):
            lm.run(ask)
        return world.all_gather(world.rank)

    assert Ranks(size).run(work) == [[*range(size)]] * size


def test_a_model_reads_as_far_as_rope_scaling_stretches_its_positions(tmp_path):
    scaling = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    for name, settings, longest in (
        ("stretched", {"rope_parameters": scaling, "max_position_embeddings": 64}, 256),
        ("as stated", {"max_position_embeddings": 64}, 64),
    ):
        checkpoint = open_checkpoint(save_tiny(tmp_path / name, "qwen2", **settings))
        model = FrozenModel(checkpoint, torch.float32, 1, "replicate", SoloWorld())
        lm = ShardedLM(model, load_tokenizer(checkpoint.path), Interruption(), 1, True)
        assert lm.max_length == longest
        with lm.task(AnswerLog(tmp_path / f"log {name}"), lambda _done, _total: None):
            request = Instance("generate_until", {}, ("a b", {"max_gen_toks": 100}), 0)
            with nullcontext() if longest > 100 else pytest.raises(sharded_lm.RequestError, match=r"100.*must be less"):
                lm.generate_until([request])
