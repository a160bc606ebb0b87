"""A task's requests, answered by all ranks."""

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
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation import sharded_lm
from hfprune_dist.evaluation.sharded_lm import ShardedLM

BATCH = 16


def make_lm(checkpoint, batch_size=1, world=None):
    model = FrozenModel(checkpoint, torch.float32, batch_size, "replicate", world or SoloWorld())
    return ShardedLM(model, load_tokenizer(checkpoint.path), Interruption(), batch_size, True)


def test_all_ranks_answer_and_know_the_answers(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))

    def work(world):
        lm = make_lm(checkpoint, 2, world)
        requests = [Instance("loglikelihood", {}, ("a b", f" {word}"), 0) for word in "cdefghi"]
        return lm.run(lambda: lm.loglikelihood(requests))

    (answers, *others) = Ranks(4).run(work)
    assert len(answers) == 7 and len(set(answers)) > 1 and others == [answers] * 3


UNSUITABLE = {
    "longer than the model reads": ("loglikelihood", ("a b", " long" * 200), "continuation_enc.*max_length"),
    "an option that there isn't": ("generate_until", ("a b", {"max_gen_toks": 2, "tempo": 1}), "not used.*tempo"),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_a_request_that_cannot_be_answered_is_an_error_of_the_task(tmp_path, what):
    method, unsuitable, message = UNSUITABLE[what]
    lm = make_lm(open_checkpoint(save_tiny(tmp_path / "model")))
    lm.task = "mine"
    with pytest.raises(sharded_lm.ModelError) as failed:
        getattr(lm, method)([Instance(method, {}, unsuitable, 0)])
    with pytest.raises(UserError, match=rf"task 'mine' can't be evaluated: {method}.*{message}"):
        raise failed.value.__cause__


def test_a_model_reads_as_far_as_rope_scaling_stretches_its_positions(tmp_path):
    scaling = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    settings = {"rope_parameters": scaling, "max_position_embeddings": 64}
    assert make_lm(open_checkpoint(save_tiny(tmp_path / "model", "qwen2", **settings))).max_length == 256


@pytest.mark.parametrize("method", ["loglikelihood", "loglikelihood_rolling"])
def test_long_requests_are_answered_in_smaller_batches(tmp_path, monkeypatch, method):
    """A batch's logits fit the limit, or belong to a single request."""
    rolls = method == "loglikelihood_rolling"  # over a document in windows of all positions
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", max_position_embeddings=16 if rolls else 128))
    lm = make_lm(checkpoint, BATCH)
    texts = [" ".join("abcd"[: 1 + number % 4] * (1 + number // 4 + 20 * rolls)) for number in range(12)]
    requests = [Instance(method, {}, (it,) if rolls else (it, " e"), 0) for it in texts]
    sizes, plain = [], lm.model.forward
    monkeypatch.setattr(
        lm.model, "forward", lambda input_ids, **how: sizes.append(input_ids.shape) or plain(input_ids, **how)
    )

    def answers(limit):
        sizes.clear()
        monkeypatch.setattr(sharded_lm, "LOGITS_BYTES", limit)
        return getattr(lm, method)(requests)

    whole, each_token = answers(2**40), checkpoint.config["vocab_size"] * (4 + 2 * 4)
    assert max(rows for rows, _ in sizes) > 2
    limit = 20 * each_token
    found = answers(limit)
    assert all(rows == 1 or rows * tokens * each_token <= limit for rows, tokens in sizes)
    numbers = [torch.tensor([it if rolls else it[0] for it in them]) for them in (whole, found)]
    assert torch.allclose(*numbers, rtol=1e-4)
