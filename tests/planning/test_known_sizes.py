"""The amount of data to train and to evaluate on, as a plan states it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.config.parameters import EvaluateParameters
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.planning import known_sizes
from hfprune_dist.planning.known_sizes import PAIRS, TASKS, TOKENS_OF_A_PAIR, packed_rows, requests_of

SETTINGS = {"num_fewshot": 0, "add_bos_token": True, "apply_chat_template": False, "batch_size": 8, "dtype": "bfloat16"}


def of_tasks(*tasks, limit=None, **changes):
    return requests_of(EvaluateParameters(tasks=list(tasks), limit=limit, **{**SETTINGS, **changes}))


@given(limit=st.integers(1, 5000), shots=st.integers(0, 5))
def test_a_limit_bounds_documents_and_makes_unknown_tasks_known(limit, shots):
    (known, other), missing = of_tasks("boolq", "mine", limit=limit, num_fewshot=shots)
    assert missing == []
    assert known.documents == min(limit, TASKS["boolq"].documents) and other.documents == limit
    assert known.tokens == (1 + shots) * TASKS["boolq"].tokens
    assert known.count == 2 * known.documents


def test_without_a_limit_tasks_that_nobody_knows_are_named():
    known, missing = of_tasks("mine", "piqa", "yours")
    assert (len(known), missing) == (1, ["mine", "yours"])


@given(samples=st.integers(1, 2**30), length=st.integers(8, 4096))
def test_rows_of_a_data_set_grow_with_its_pairs(samples, length):
    whole = RecoveryConfig(sequence_length=length)
    some = RecoveryConfig(sequence_length=length, samples=samples)
    assert 1 <= packed_rows(some) <= packed_rows(whole)
    pairs = min(samples, PAIRS[whole.dataset])
    assert packed_rows(some) == -(-pairs * min(TOKENS_OF_A_PAIR, length) // length)


def test_pairs_that_nobody_can_count_are_unknown_until_samples_are_set(tmp_path):
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1")
    for place in ({"dataset": "someone/some-pairs"}, {"path": str(tmp_path / "pairs.parquet")}):
        assert packed_rows(RecoveryConfig(**place)) is None
        assert packed_rows(RecoveryConfig(**place, samples=1024)) == TOKENS_OF_A_PAIR


@pytest.mark.parametrize("suffix", [".JSONL", ".Ndjson", ".Csv", ".TSV"])
def test_pairs_are_counted_however_an_extension_is_written(tmp_path, suffix):
    for name in (f"a{suffix}", f"b{suffix.lower()}"):
        (tmp_path / name).write_text("some, pair\n" * 8)
        assert packed_rows(RecoveryConfig(path=str(tmp_path / name), sequence_length=8)) == 8


@pytest.mark.parametrize("files", [1, 3])
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=30))
def test_pairs_of_files_are_counted(tmp_path_factory, files, lengths):
    folder = tmp_path_factory.mktemp("pairs")
    lines = [json.dumps({"instruction": "i", "response": "r" * length}) for length in lengths]
    for number in range(files):
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    pairs, tokens = known_sizes._pairs_of_files(folder)
    assert pairs == files * len(lengths)
    assert known_sizes.TEMPLATE < tokens < 300


def test_other_files_of_a_folder_are_not_counted(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"instruction": "what", "response": "that"}\n' * 5)
    alone = packed_rows(RecoveryConfig(path=str(tmp_path)))
    (tmp_path / "README.md").write_text("# Pairs\n")
    (tmp_path / ".hidden").write_text("{}")
    assert packed_rows(RecoveryConfig(path=str(tmp_path))) == alone == 1
    assert packed_rows(RecoveryConfig(path=str(tmp_path / "gone"))) is None


def test_long_files_are_told_from_their_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(known_sizes, "BEGINNING", 1000)
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"instruction": "what", "response": "that"}\n' * 500)
    pairs, _ = known_sizes._pairs_of_files(file)
    assert pairs == 500
    file.write_text("")
    assert packed_rows(RecoveryConfig(path=str(file))) is None


def test_pairs_that_vanish_meanwhile_are_of_unknown_number(tmp_path, monkeypatch):
    monkeypatch.setattr(known_sizes, "files_of", lambda _: [tmp_path / "gone.jsonl"])
    assert packed_rows(RecoveryConfig(path=str(tmp_path), dataset=None)) is None
