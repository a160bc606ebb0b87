"""Hidden states on disk: any number of ranks finds them, and damaged ones are not taken for intact ones."""

import errno
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import SoloWorld

from hfprune_dist.checkpoints import tensor_files
from hfprune_dist.distributed.layer_states import LayerStates

DRAWN = settings(
    derandomize=True, deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def states_of(folder, micro_batches, ranks):
    return [LayerStates(folder, micro_batches, SoloWorld(rank, ranks)) for rank in range(ranks)]


def save(folder, micro_batches, ranks, done):
    for rank, states in enumerate(states_of(folder, micro_batches, ranks)):
        mine = micro_batches[rank::ranks]
        states.save(done, {index: {"a": value_of(done, index), "0,2": value_of(done, index) + 1} for index in mine})


def value_of(done, index):
    return torch.full((2, 3, 4), 100.0 * done + index, dtype=torch.bfloat16)


@DRAWN
@given(st.sets(st.integers(0, 40), min_size=1, max_size=7), st.integers(1, 9), st.integers(1, 9))
def test_any_number_of_ranks_finds_what_any_other_saved_last(tmp_path_factory, chosen, before, after):
    folder, micro_batches = tmp_path_factory.mktemp("states") / "pass", sorted(chosen)
    for done in (1, 2):
        save(folder, micro_batches, before, done)
        assert len(list(folder.iterdir())) == len(micro_batches), "one layer's alone"
    found = {}
    for states in states_of(folder, micro_batches, after):
        done, mine = states.newest()
        assert done == 2
        found |= mine
    assert sorted(found) == micro_batches
    for index, named in found.items():
        assert torch.equal(named["a"], value_of(2, index)) and torch.equal(named["0,2"], value_of(2, index) + 1)


def test_a_folder_that_can_not_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    save(tmp_path, [0], 1, 1)

    def refuse(_folder):
        raise PermissionError("denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    monkeypatch.setattr("os.scandir", refuse)
    (states,) = states_of(tmp_path, [0], 1)
    with pytest.raises(PermissionError):
        states.newest()


@pytest.mark.parametrize("micro_batches", [1, 5])
def test_what_was_saved_is_read_once(tmp_path, monkeypatch, micro_batches):
    """It is as large as the windows."""
    save(tmp_path, list(range(micro_batches)), 1, 3)
    read = []
    load_file = tensor_files.load_file
    monkeypatch.setattr(tensor_files, "load_file", lambda file: (read.append(file.name), load_file(file))[1])
    (states,) = states_of(tmp_path, list(range(micro_batches)), 1)
    assert states.newest()[0] == 3
    assert sorted(read) == [f"3.{index}.safetensors" for index in range(micro_batches)]


def test_a_layer_counts_once_all_its_micro_batches_are_there_and_whole(tmp_path):
    save(tmp_path, [0, 1, 2], 1, 1)
    first, _ = states_of(tmp_path, [0, 1, 2], 2)
    first.save(2, {index: {"a": value_of(2, index), "0,2": value_of(2, index)} for index in (0, 2)})  # rank 1 died
    (tmp_path / "1.0.safetensors").unlink(missing_ok=True)
    whole = LayerStates(tmp_path, [0, 1, 2], SoloWorld())
    assert whole.newest() == (0, {})
    whole.save(3, {index: {"a": value_of(3, index)} for index in range(3)})
    assert whole.newest()[0] == 3
    file = tmp_path / "3.1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert whole.newest() == (0, {})
    assert (tmp_path / "3.1.safetensors.damaged-1").is_file()


def test_nothing_is_there_before_and_after_a_pass(tmp_path):
    states = LayerStates(tmp_path / "pass", [0], SoloWorld())
    assert states.newest() == (0, {})
    states.save(1, {0: {"a": torch.ones(1)}})
    states.discard()
    assert states.newest() == (0, {}) and not (tmp_path / "pass").exists()
    with pytest.raises(FileNotFoundError):
        next((tmp_path / "pass").iterdir())


def test_a_state_that_can_not_be_deleted_ends_no_rank(tmp_path, monkeypatch):
    save(tmp_path, [0, 1], 2, 1)

    def refuse(_file):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", refuse)
        save(tmp_path, [0, 1], 2, 2)
    assert len(list(tmp_path.iterdir())) == 4
    save(tmp_path, [0, 1], 2, 3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["3.0.safetensors", "3.1.safetensors"]
