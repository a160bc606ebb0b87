"""The reference stage: what the dense model's head reads, on any number of ranks."""

import shutil

import pytest
import torch
from evaluations import TEXT, reference_stage
from made_stages import being_made, stage_of
from ranks import files_of
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, write_documents
from transformers import AutoModelForCausalLM
from worlds import Death, Ranks, run_in_threads

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input
from hfprune_dist.training.teacher_states import DENSE, DenseStates

IMPORTANCE = stage_of("importance", "tiny", {}, {})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    save_tiny(folder / "dense")
    write_documents(folder / "held-out.jsonl", count=5)
    return folder


def held_out(source):
    """Return the stage that evaluations compare with."""
    return reference_stage(source, Input("dense", str(source / "dense")), "float32", "held-out")


def run_alone(store, stage):
    run_in_threads(store, stage, Ranks(1))
    return DenseStates(store.handle(stage.id).artifact)


def test_held_out_text_is_seen_as_the_whole_model_sees_it(source, tmp_path):
    states = run_alone(Store(tmp_path), held_out(source))
    assert states.windows_ST.shape == (5, 48)
    assert states.windows_ST[:, 0].tolist() == [1] * 5  # BOS
    body = AutoModelForCausalLM.from_pretrained(source / "dense").model
    with torch.no_grad():
        for index, window_T in enumerate(states.windows_ST):
            expected_TC = body(input_ids=window_T[None]).last_hidden_state[0]
            torch.testing.assert_close(states.hidden(index), expected_TC, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("windows", "size"), [(1, 4), (5, 2)])
def test_ranks_keep_step_whatever_the_number_of_windows_also_after_a_death(source, tmp_path_factory, windows, size):
    """Some ranks have no micro-batch of their own."""
    stage = held_out(source)
    params = {**stage.params.to_json(), "text": TEXT | {"windows": windows}}
    stage = stage_of(stage.kind, stage.label, params, stage.inputs)
    stores = [Store(tmp_path_factory.mktemp(str(ranks))) for ranks in (1, size)]
    run_in_threads(stores[0], stage, Ranks(1))
    with pytest.raises(Death):
        run_in_threads(stores[1], stage, Ranks(size, deaths={size - 1: 3}))
    assert not stores[1].handle(stage.id).artifact.exists()
    run_in_threads(stores[1], stage, Ranks(size))
    assert files_of(stores[0], stage) == files_of(stores[1], stage)


def test_calibration_windows_are_rows_to_learn_from(tmp_path):
    save_tiny(tmp_path / "dense")
    windows_ST = torch.randint(3, 264, (6, 24), generator=torch.Generator().manual_seed(0))
    store = Store(tmp_path / "store")
    with being_made(store, IMPORTANCE) as draft:
        save_file({"input_ids": windows_ST}, draft / "windows.safetensors")
    inputs = {"model": Input("dense", str(tmp_path / "dense")), "importance": IMPORTANCE.as_input()}
    states = run_alone(store, stage_of("reference", "tiny", {"dtype": "float32"}, inputs))
    with torch.no_grad():
        expected_STC = tiny_model("llama").model(input_ids=windows_ST).last_hidden_state
    for row in range(6):
        torch.testing.assert_close(states(row)[DENSE], expected_STC[row], rtol=1e-4, atol=1e-5)
        assert states(row)["input_ids"].tolist() == states(row)["labels"].tolist() == windows_ST[row].tolist()


def test_states_that_are_no_numbers_are_refused(source, tmp_path):
    """Also if only one rank's windows see them: the embedding that is damaged is of a token that few windows have."""
    stage = held_out(source)
    windows_ST = run_alone(Store(tmp_path / "sound"), stage).windows_ST
    counts = {token: int((windows_ST == token).any(dim=1).sum()) for token in windows_ST.unique().tolist()}
    rarest = min(counts, key=counts.__getitem__)
    assert counts[rarest] < len(windows_ST)
    shutil.copytree(source / "dense", tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][rarest, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    inputs = {**stage.inputs, "model": Input("damaged", str(tmp_path / "damaged"))}
    stage = stage_of(stage.kind, stage.label, stage.params, inputs)
    store = Store(tmp_path / "store")
    with pytest.raises(UserError, match=r"final hidden states are NaN or infinite; check the checkpoint's weights"):
        run_in_threads(store, stage, Ranks(3))
    assert store.handle(stage.id).verify().state == "missing"
