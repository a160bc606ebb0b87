"""Windows of several texts: every part of the windows has each text in its share, in the same order at every draw."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer, write_documents

from hfprune_dist.config.texts import apportioned
from hfprune_dist.data.windows import Sampling, Source, interleaved, read_mixture, read_windows
from hfprune_dist.distributed.sums import is_held_out

TEXT = {"text_field": "text"}


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
    sources = [Source(TEXT, file, count) for file, count in zip(files, (9, 3), strict=True)]
    mixed = read_mixture(sources, tokenizer, sampling, [False] * 12, "calibration")
    alone = [
        read_windows(TEXT, file, tokenizer, Sampling(n, 16, seed=3), "") for file, n in zip(files, (9, 3), strict=True)
    ]
    expected = [row for windows in alone for row in windows.input_ids_ST.tolist()]
    assert sorted(mixed.input_ids_ST.tolist()) == sorted(expected)
    assert mixed.input_ids_ST.tolist() != expected, "one text after the other"
    assert mixed.tokens == sum(windows.tokens for windows in alone)
