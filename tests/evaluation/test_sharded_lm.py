"""A task's requests, answered by all ranks."""

import pytest
import torch
from families import save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from ranks import SoloWorld
from tiny import save_tiny
from tokenizers.processors import TemplateProcessing
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.sharded_lm import ModelError, ShardedLM, cut_questions, cut_where_it_pays


def make_lm(checkpoint, batch_size=1, world=None):
    model = FrozenModel(checkpoint, torch.float32, "replicate", world or SoloWorld())
    return ShardedLM(model, load_tokenizer(checkpoint.path), Interruption(), batch_size, True)


def test_all_ranks_answer_and_know_the_answers(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))

    def work(world):
        lm = make_lm(checkpoint, 2, world)
        requests = [
            Instance("loglikelihood", {}, (f"a {context}", f" {word}"), 0) for context in "xy" for word in "cde"
        ]
        return lm.run(lambda: lm.loglikelihood(requests))

    (answers, *others) = Ranks(4).run(work)
    assert len(answers) == 6 and len(set(answers)) > 1 and others == [answers] * 3


def test_what_a_tokenizer_puts_after_a_text_is_no_answer(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))
    model, plain, ending = (
        FrozenModel(checkpoint, torch.float32, "replicate", SoloWorld()),
        *(load_tokenizer(checkpoint.path) for _ in range(2)),
    )
    known = [(token, ending.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=known)
    lms = [ShardedLM(model, tokenizer, Interruption(), 2, True) for tokenizer in (plain, ending)]
    asked = [Instance("loglikelihood", {}, ("a question", f" {word}"), 0) for word in ("yes", "perhaps")]
    written = [Instance("generate_until", {}, ("a question", {"until": ["x"], "max_gen_toks": 4}), 0)]
    answers, others = ((lm.loglikelihood(asked), lm.generate_until(written)) for lm in lms)
    assert answers == others


# Windows, learnt positions, positions along several axes; and recurrent states, in a cache of their own or not.
@pytest.mark.parametrize(
    ("family", "shares"),
    [("gemma2", True), ("opt", True), ("qwen2_5_vl", True), ("minimax", False), ("bamba", False)],
)
def test_choices_share_the_forward_of_their_question(tmp_path, family, shares):
    lm = make_lm(open_checkpoint(save_model(tmp_path / "model", family)), 24)
    draw = torch.Generator().manual_seed(0)
    contexts, choices = (torch.randint(3, 40, shape, generator=draw).tolist() for shape in ((8, 9), (3, 4)))
    requests = [(None, context, choice) for context in contexts for choice in choices]
    tokens, scored = [], []
    body, head = lm._frozen.module, lm._frozen._family.head_of(lm._frozen.module)
    handles = [
        body.register_forward_pre_hook(
            lambda _, __, given: tokens.append(given["input_ids"].numel()), with_kwargs=True
        ),
        head.register_forward_hook(lambda _, __, logits: scored.append(logits.shape[:-1].numel())),
    ]
    together = lm._loglikelihood_tokens(requests)
    for handle in handles:
        handle.remove()
    assert sum(tokens) == 8 * (8 + 3 * 4 if shares else 3 * (9 + 3))
    assert sum(scored) == 8 * 3 * 4
    for (value, greedy), (_, context, choice) in zip(together, requests, strict=True):
        with torch.no_grad():
            logits_TV = lm._frozen.module(torch.tensor([context + choice])).logits[0, len(context) - 1 : -1]
        expected = logits_TV.log_softmax(-1).gather(1, torch.tensor(choice)[:, None]).sum()
        assert value == pytest.approx(expected.item(), abs=1e-4)
        assert greedy == (logits_TV.argmax(-1).tolist() == choice)


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=20).map(tuple)


@settings(max_examples=40)
@given(st.dictionaries(TOKENS, st.lists(TOKENS, min_size=1, max_size=5, unique=True)), st.booleans(), st.integers(1, 9))
def test_batches_have_each_sequence_once_and_keep_to_limits(choices, shares, batch_size):
    questions = {
        (3, *context, 4): [(3, *context, 4, *choice) for choice in those] for context, those in choices.items()
    }
    batches = cut_questions(questions, shares, batch_size, most_tokens=90)
    everything = sorted(tokens for those in questions.values() for tokens in those)
    assert sorted(tokens for _, sequences in batches for tokens in sequences) == everything
    for shared, sequences in batches:
        contexts = [tokens.index(4) + 1 for tokens in sequences]
        assert len(sequences) == 1 or len(sequences) * max(map(len, sequences)) <= 90
        assert len({tokens[: tokens.index(4)] for tokens in sequences} if shared else sequences) <= batch_size
        assert shared == 0 or (shares and shared == min(contexts) - 1 and len(sequences) > 1)


def test_a_forward_more_saves_padding():
    assert cut_where_it_pays([60, 59, 20, 20, 18]) == [slice(0, 2), slice(2, 5)]
    assert cut_where_it_pays([9, 8, 8, 3]) == [slice(0, 4)]


UNSUITABLE = {
    "longer than the model reads": ("loglikelihood", ("a b", " long" * 200), "512 tokens.*empty or too long"),
    "an option that there isn't": ("generate_until", ("a b", {"max_gen_toks": 2, "tempo": 1}), "not used.*tempo"),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_a_request_that_cannot_be_answered_is_an_error_of_the_task(tmp_path, what):
    method, unsuitable, message = UNSUITABLE[what]
    lm = make_lm(open_checkpoint(save_tiny(tmp_path / "model")))
    lm.task = "mine"
    with pytest.raises(ModelError) as failed:
        getattr(lm, method)([Instance(method, {}, unsuitable, 0)])
    with pytest.raises(UserError, match=rf"task 'mine' can't be evaluated: {method}.*{message}"):
        raise failed.value.__cause__
