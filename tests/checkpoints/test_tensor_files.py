import pytest
import torch
from damage import DAMAGES, damage
from hypothesis import given, settings

from hfprune_dist.checkpoints.tensor_files import DamagedFileError, is_usable, load_tensors, save_tensors

TENSORS = {
    "weights": torch.arange(6.0).reshape(2, 3).bfloat16(),
    "none": torch.zeros(0, 3),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
}
TEXTS = {"step": "3", "losses": "[]", "more": "é"}


def test_what_was_written_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_tensors(TENSORS, file, TEXTS)
    tensors, texts = load_tensors(file)
    assert texts == TEXTS and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    content = file.read_bytes()
    save_tensors(TENSORS, file, TEXTS)
    assert file.read_bytes() == content


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("written") / "a.safetensors"
    save_tensors(TENSORS, file, TEXTS)
    return file, file.read_bytes()


@settings(max_examples=50)
@given(how=DAMAGES)
def test_any_damage_is_noticed(written, how):
    file, content = written
    file.write_bytes(content)
    if damage(file, *how):
        with pytest.raises(DamagedFileError):
            load_tensors(file)


def test_a_damaged_file_is_told_and_not_used(tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    assert not is_usable(file) and not capsys.readouterr().out
    file.write_bytes(b"one")
    assert not is_usable(file) and "what it held is computed again" in capsys.readouterr().out
