"""How a task's requests are cut into chunks for ranks to share, and the answers of all ranks."""

from contextlib import nullcontext

import pytest
import torch
from lm_eval.api.instance import Instance
from ranks import SoloWorld
from tiny import save_tiny
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.evaluation import sharded_lm
from hfprune_dist.evaluation.sharded_lm import CHUNK_BATCHES, WANTED_CHUNKS, AnswerLog, ShardedLM, chunk_size

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
def test_all_ranks_answer_and_know_the_answers(tmp_path, size):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))

    def work(world):
        model = FrozenModel(checkpoint, torch.float32, 2, "replicate", world)
        lm = ShardedLM(model, load_tokenizer(checkpoint.path), Interruption(), 2, True)

        def ask():
            with lm.task(AnswerLog(tmp_path / "log"), lambda _done, _total: None):
                return lm.loglikelihood([Instance("loglikelihood", {}, ("a b", f" {word}"), 0) for word in "cdefghi"])

        return lm.run(ask)

    (answers, *others) = Ranks(size).run(work)
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


@pytest.mark.parametrize("method", ["loglikelihood", "loglikelihood_rolling"])
def test_long_requests_are_answered_in_smaller_batches(tmp_path, monkeypatch, method):
    """A batch's logits fit the limit, or belong to a single request."""
    rolls = method == "loglikelihood_rolling"  # over a document in windows of all positions
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", max_position_embeddings=16 if rolls else 128))
    model = FrozenModel(checkpoint, torch.float32, BATCH, "replicate", SoloWorld())
    lm = ShardedLM(model, load_tokenizer(checkpoint.path), Interruption(), BATCH, True)
    texts = [" ".join("abcd"[: 1 + number % 4] * (1 + number // 4 + 20 * rolls)) for number in range(12)]
    requests = [Instance(method, {}, (it,) if rolls else (it, " e"), 0) for it in texts]
    sizes, plain = [], model.module.forward
    monkeypatch.setattr(
        model.module, "forward", lambda input_ids, **how: sizes.append(input_ids.shape) or plain(input_ids, **how)
    )

    def answers(limit):
        sizes.clear()
        monkeypatch.setattr(sharded_lm, "LOGITS_BYTES", limit)
        with lm.task(AnswerLog(tmp_path / f"log {limit}"), lambda _done, _total: None):
            return getattr(lm, method)(requests)

    whole, each_token = answers(2**40), checkpoint.config["vocab_size"] * (4 + 2 * 4)
    assert max(rows for rows, _ in sizes) > 2
    limit = 20 * each_token
    found = answers(limit)
    assert all(rows == 1 or rows * tokens * each_token <= limit for rows, tokens in sizes)
    numbers = [torch.tensor([it if rolls else it[0] for it in them]) for them in (whole, found)]
    assert torch.allclose(*numbers, rtol=1e-4)
