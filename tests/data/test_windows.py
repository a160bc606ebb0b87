"""Windows of one text or several, and checks of texts before a sweep begins, which agree with the stages' own."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer, write_documents

from hfprune_dist.config.texts import apportioned
from hfprune_dist.data.examples import Example, prompt_for
from hfprune_dist.data.instructions import check_examples, encode, require_trainable
from hfprune_dist.data.text import Beginning
from hfprune_dist.data.windows import (
    Sampling,
    check_length,
    interleaved,
    places_in_random_order,
    read_mixture,
    read_windows,
    sample_windows,
    without_repetitions,
)
from hfprune_dist.distributed.sums import is_held_out
from hfprune_dist.errors import UserError

TOKENIZER = tiny_tokenizer()


class LetterTokenizer:
    """A token for each letter; counts those that it is given."""

    name_or_path, characters = "/models/letters", 0

    def __call__(self, text, **_):
        self.characters += len(text)
        return {"input_ids": [ord(letter) for letter in text]}


def message_of(function, *arguments):
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return None


@settings(max_examples=60)
@given(st.lists(st.text(max_size=30), max_size=5), st.integers(8, 40), st.booleans(), st.integers(1, 4))
def test_the_check_and_the_stage_agree_on_windows(documents, length, add_bos, samples):
    sampling = Sampling(samples, length, 0, add_bos)
    whole = Beginning(documents, is_all=True)
    refusal = message_of(check_length, whole, TOKENIZER, sampling, "here")
    assert refusal == message_of(sample_windows, without_repetitions(documents), TOKENIZER, sampling, "here")
    check_length(Beginning(whole.records, is_all=False), TOKENIZER, sampling, "here")  # the rest may be longer


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.text(max_size=9), st.sampled_from(["", " \n", "tell", "x" * 90])), min_size=1, max_size=5),
    st.integers(150, 200),
)
def test_the_check_and_the_stage_agree_on_pairs(pairs, length):
    whole = Beginning([Example("here", prompt_for(ask), tell) for ask, tell in pairs], is_all=True)
    encoded = encode(TOKENIZER, whole.records, length)
    expected = message_of(require_trainable, encoded, length, "here")
    assert message_of(check_examples, whole, TOKENIZER, length, "here") == expected
    assert (expected is None) == any(encoded)
    check_examples(Beginning(whole.records, is_all=False), TOKENIZER, length, "here")


def test_the_search_for_long_documents_ends(monkeypatch):
    monkeypatch.setattr("hfprune_dist.data.windows.TOKENIZED_CHARACTERS", 1000)
    for texts in (["x" * 10**7], [f"{number:099}" for number in range(10**4)]):
        tokenizer = LetterTokenizer()
        beginning = Beginning(texts, is_all=True)
        message_of(check_length, beginning, tokenizer, Sampling(200, 100, 0), "here")
        assert tokenizer.characters < 1200


@settings(max_examples=60)
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
            found.append(sample_windows(given_texts, tokenizer, sampling, "here", order).tolist())
        except UserError as error:
            found.append(str(error))
    assert found[0] == found[1]


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=20), st.booleans())
def test_a_window_begins_as_the_tokenizer_begins_a_text(text, adds_bos):
    """Some name a BOS token and don't put it there."""
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    whole = tokenizer(text)["input_ids"]
    assert tokenizer.bos_token_id == 1 and (whole[0] == 1) == adds_bos
    windows_ST = sample_windows([text], tokenizer, Sampling(1, len(whole), 0), "here")
    assert windows_ST.tolist() == [whole]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 5), st.integers(0, 3))
def test_each_window_has_a_document_of_its_own_or_the_number_needed_is_told(tmp_path_factory, lengths, samples, seed):
    """So no window that is held out has text that was fitted. Documents of the same length are the same document."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    texts = [chr(65 + length) * length for length in lengths]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["-", *texts]))
    enough = {text for text in texts if len(text) >= 8}
    given_to = {"text_field": "text"}, file, LetterTokenizer(), Sampling(samples, 8, seed), "here"
    if len(enough) < samples:
        told = f"{samples} windows need as many different documents of at least 8 tokens"
        assert told in (message := message_of(read_windows, *given_to)) and f"but it has {len(enough)} (" in message
    else:
        assert len({window[0] for window in read_windows(*given_to).tolist()}) == samples


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 99), st.data())
def test_every_part_of_the_windows_has_the_texts_in_their_shares(counts, micro_batch_size, seed, data):
    total = sum(counts)
    batches = -(-total // micro_batch_size)
    apart = [is_held_out(window // micro_batch_size, batches) for window in range(total)]
    order = interleaved(counts, apart, seed)
    assert [order.count(text) for text in range(len(counts))] == counts
    assert order == interleaved(counts, apart, seed)
    fitted = [text for text, held_out in zip(order, apart, strict=True) if not held_out]
    held_out = [text for text, held_out in zip(order, apart, strict=True) if held_out]
    end = data.draw(st.integers(0, len(fitted)))
    for part in (held_out, fitted[end:]):
        for text, count in enumerate(counts):
            assert abs(part.count(text) - len(part) * count / total) < 1 + len(counts)


@settings(max_examples=100)
@given(st.integers(1, 300), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_shares_are_whole_windows_and_all_of_them(total, weights):
    counts = apportioned(total, weights)
    assert sum(counts) == total
    assert all(abs(count - total * weight / sum(weights)) < 1 for count, weight in zip(counts, weights, strict=True))


def test_windows_of_a_mixture_are_those_of_its_texts(tmp_path):
    files = [write_documents(tmp_path / f"{seed}.jsonl", seed=seed) for seed in (0, 7)]
    tokenizer, sampling = tiny_tokenizer(), Sampling(12, 16, seed=3)
    sources = [({"text_field": "text"}, file, count) for file, count in zip(files, (9, 3), strict=True)]
    mixed = read_mixture(sources, tokenizer, sampling, [False] * 12, "calibration")
    expected = []
    for file, count in zip(files, (9, 3), strict=True):
        expected += read_windows({"text_field": "text"}, file, tokenizer, Sampling(count, 16, seed=3), "").tolist()
    assert sorted(mixed.tolist()) == sorted(expected)
    assert mixed.tolist() != expected, "one text after the other"
