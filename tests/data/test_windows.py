"""Checks of a text before a sweep begins, and the stage's own: both reach the same verdict."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from hfprune_dist.data import windows
from hfprune_dist.data.instructions import encode_for, nothing_to_train_on, prompt_for, require_room, require_trainable
from hfprune_dist.data.text import Beginning
from hfprune_dist.data.windows import (
    Sampling,
    places_in_random_order,
    remark_on_overlap,
    require_long_enough,
    require_tokens,
    sample_windows,
)
from hfprune_dist.errors import UserError

TOKENIZER = tiny_tokenizer()


class CountingTokenizer:
    """A token for every ``per_token`` characters; counts the characters that it is given."""

    bos_token_id, name_or_path = None, "/models/counting"

    def __init__(self, per_token):
        self.per_token = per_token
        self.characters = 0

    def __call__(self, text, **_):
        self.characters += len(text)
        return {"input_ids": [0] * (len(text) // self.per_token)}


def message_of(function, *arguments):
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=30), max_size=5), st.integers(8, 40), st.booleans(), st.integers(1, 4))
def test_the_check_and_the_stage_agree_on_windows(documents, length, add_bos, apart):
    """Also on whether a text has enough tokens for ``apart`` windows of a mixture, without using any twice."""
    sampling = Sampling(apart, length, 0, add_bos)

    def stage():
        cut = sample_windows(documents, TOKENIZER, sampling, "here")
        require_tokens(cut.tokens, TOKENIZER, sampling, "here")

    whole = Beginning([(text,) for text in documents], is_all=True)
    assert message_of(require_long_enough, whole, TOKENIZER, sampling, "here") == message_of(stage)
    part = Beginning(whole.texts, is_all=False)
    require_long_enough(part, TOKENIZER, sampling, "here")  # the rest of the text may have longer documents


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.text(max_size=9), st.sampled_from(["", " \n", "tell", "x" * 90])), max_size=5),
    st.integers(150, 200),
)
def test_the_check_and_the_stage_agree_on_pairs(pairs, length):
    whole = Beginning(list(pairs), is_all=True)
    encoded = encode_for(TOKENIZER, [(prompt_for(ask), tell) for ask, tell in pairs], length)
    expected = None if any(encoded) else str(nothing_to_train_on(len(pairs), length, "here"))
    assert message_of(require_trainable, whole, TOKENIZER, length, "here") == expected
    require_trainable(Beginning(whole.texts, is_all=False), TOKENIZER, length, "here")


def test_a_little_of_a_long_document_is_tokenized():
    tokenizer = CountingTokenizer(4)
    require_long_enough(Beginning([("x" * 10**7,)], is_all=True), tokenizer, Sampling(1, 100, 0), "here")
    assert tokenizer.characters < 10**4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 9), st.integers(8, 20))
def test_a_text_whose_windows_must_overlap_is_told(lengths, samples, sequence_length):
    tokenizer = CountingTokenizer(1)
    whole = Beginning([("x" * length,) for length in lengths], is_all=True)
    sampling = Sampling(samples, sequence_length, 0, add_bos_token=False)
    found = sum(length for length in lengths if length >= sequence_length)
    remark = remark_on_overlap(whole, tokenizer, sampling, "here")
    assert (remark is not None) == (found < samples * sequence_length)
    said = f"here: {found} tokens in documents that are long enough by the tokenizer of /models/counting, and {samples}"
    assert remark is None or remark.startswith(f"{said} windows")
    assert remark_on_overlap(Beginning(whole.texts, is_all=False), tokenizer, sampling, "here") is None


def test_messages_about_short_texts_name_the_model_whose_tokenizer_counted():
    tokenizer, named = CountingTokenizer(1), "by the tokenizer of /models/counting"
    short, apart = Beginning([("x" * 9,)], is_all=True), Sampling(2, 8, 0)
    too_short = message_of(require_long_enough, short, tokenizer, Sampling(1, 10, 0), "here")
    assert too_short.startswith(f"here: no document has 10 tokens {named} (1 read, the longest has 9)")
    assert f"9 tokens in documents that are long enough {named}" in message_of(
        require_long_enough, short, tokenizer, apart, "here"
    )


def test_a_document_of_few_tokens_is_tokenized_as_a_whole():
    tokenizer = CountingTokenizer(1000)
    require_long_enough(Beginning([("x" * 10**5,)], is_all=True), tokenizer, Sampling(1, 100, 0), "here")


def test_the_search_for_a_long_document_ends(monkeypatch):
    monkeypatch.setattr(windows, "TOKENIZED_CHARACTERS", 1000)
    tokenizer = CountingTokenizer(4)
    require_long_enough(Beginning([("x" * 99,)] * 10**4, is_all=True), tokenizer, Sampling(1, 100, 0), "here")
    assert tokenizer.characters < 1200


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(136, 147), st.text(max_size=5))
def test_the_template_leaves_room_for_a_response_or_no_pair_is_trained_on(length, instruction):
    if message_of(require_room, TOKENIZER, length):
        assert encode_for(TOKENIZER, [(prompt_for(instruction), "tell")], length) == [None]
    else:
        assert encode_for(TOKENIZER, [(prompt_for(""), "tell")], length) != [None]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 3))
def test_windows_of_documents_in_random_order_are_those_of_a_shuffled_list(lengths, samples, seed):
    """Without the list: documents are read in the order of the file."""
    texts = [chr(65 + number) * length for number, length in enumerate(lengths)]
    places = places_in_random_order(len(texts), seed)
    shuffled = [text for _, text in sorted(zip(places, texts, strict=True))]
    tokenizer, sampling = LetterTokenizer(), Sampling(samples, 8, seed, add_bos_token=False)
    found = []
    for given_texts, order in ((texts, places), (shuffled, None)):
        try:
            cut = sample_windows(given_texts, tokenizer, sampling, "here", order)
            found.append((cut.input_ids_ST.tolist(), cut.documents_read, cut.documents_used, cut.tokens))
        except UserError as error:
            found.append(str(error))
    assert found[0] == found[1]


class LetterTokenizer:
    bos_token_id, name_or_path = None, "/models/letters"

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}
