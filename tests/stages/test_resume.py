"""Layer-by-layer passes that end early: another number of ranks does the rest, with the same bits."""

import shutil

import pytest
import torch
from faults.kill import arm
from forks import INTERRUPTED, on_ranks
from made_stages import stage_of
from ranks import assert_close_files
from safetensors.torch import save_file
from scoring import LAYERS, files_of, make_stage, run
from tiny import save_tiny

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.stages import importance, prune, reference
from hfprune_dist.stages.context import Context
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

IMPORTANCE = stage_of("importance", "tiny", {}, {})
RANKS = [(1, 2), (3, 1), (2, 3)]
# Layers that an uninterrupted search takes its candidates through; what it measures last is known by then.
SEARCHED = 2 * LAYERS


class Interrupting(Interruption):
    """Asks all ranks to end when they check for an interruption the ``at``-th time."""

    def __init__(self, at):
        super().__init__()
        self._at = at

    def agreed(self, world):
        self._at -= 1
        return self._at == 0


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """Return a function that logs a line per call of a method, in any process, and returns the lines' reader."""
    file = tmp_path / "log"

    def log(owner, name, line_of):
        original = getattr(owner, name)

        def wrapper(*arguments):
            result = original(*arguments)
            with file.open("a") as stream:
                stream.write(f"{line_of(*arguments)}\n")
            return result

        monkeypatch.setattr(owner, name, wrapper)
        return lambda: file.read_text().split() if file.is_file() else []

    return log


def run_stage(store, stage, world, interrupt_at=0):
    store.work(stage.id).mkdir(parents=True, exist_ok=True)
    module = {"prune": prune, "reference": reference, "importance": importance}[stage.kind]
    interruption = Interrupting(interrupt_at) if interrupt_at else Interruption()
    module.run(Context(stage, store, world, RuntimeConfig(), Progress(None), {}, {}, 1, interruption=interruption))


def ended(ranks, store, stage, interrupt_at=0):
    codes = on_ranks(ranks, lambda world: run_stage(store, stage, world, interrupt_at)).codes
    assert len(set(codes)) == 1, codes
    return codes[0]


# The second pass of the importance stage.


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A store whose first pass is complete and whose second has not begun, its stage, and the whole stage's files."""
    folder = tmp_path_factory.mktemp("calibrated")
    stage, store, whole = make_stage(folder, "qwen2"), Store(folder / "store"), Store(folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "_score_layers", lambda *_: (_ for _ in ()).throw(Interrupted))
        assert on_ranks(1, lambda world: run(store, stage, world)).codes == [INTERRUPTED]
    shutil.copytree(store.root, whole.root)
    assert ended(1, whole, stage) == 0
    return store, stage, files_of(whole, stage)


@pytest.mark.parametrize(("layers", "before", "after"), [(1, 1, 2), (2, 3, 1), (1, 2, 3)])
def test_a_second_pass_solves_no_layer_twice(calibrated, tmp_path, logged, layers, before, after):
    solved = logged(importance, "_layer_scores", lambda _kind, layer, *_: layer.number)
    original, stage, expected = calibrated
    store = Store(shutil.copytree(original.root, tmp_path / "store"))
    assert ended(before, store, stage, interrupt_at=layers) == INTERRUPTED
    assert sorted(solved()) == [str(number) for number in range(layers)], "also what waited for other ranks"
    assert ended(after, store, stage) == 0
    assert sorted(solved()) == ["0", "1", "2"]
    assert_close_files(files_of(store, stage), expected)


@pytest.mark.parametrize("kill_at", range(1, 2 * LAYERS + 1))
def test_a_second_pass_goes_on_after_a_death_at_any_write(calibrated, tmp_path, kill_at):
    original, stage, expected = calibrated
    store = Store(shutil.copytree(original.root, tmp_path / "store"))

    def die(world):
        if world.is_first:
            arm(kill_at, "/scores/")
        run_stage(store, stage, world)

    assert on_ranks(1, die).codes == [-9]
    assert ended(2, store, stage) == 0
    assert_close_files(files_of(store, stage), expected)


def test_damaged_scores_of_a_layer_are_made_again(calibrated, tmp_path, logged):
    solved = logged(importance, "_layer_scores", lambda _kind, layer, *_: layer.number)
    original, stage, expected = calibrated
    store = Store(shutil.copytree(original.root, tmp_path / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "open_draft", lambda _self: (_ for _ in ()).throw(Interrupted))
        assert ended(1, store, stage) == INTERRUPTED
    file = store.work(stage.id) / "scores" / "layer-1.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    assert ended(1, store, stage) == 0
    assert solved() == ["0", "1", "2", "1"]
    assert files_of(store, stage) == expected


# Stages that read scores and windows.


def prepare(folder, kind="prune", **method):
    """Prepare a stage; of its three held-out micro-batches, two ranks get different numbers."""
    store = Store(folder / "store")
    draft = store.open_draft(IMPORTANCE.id)
    generator = torch.Generator().manual_seed(0)
    scores = {f"layers.{it}.entropy": torch.rand(48, generator=generator, dtype=torch.float64) for it in range(LAYERS)}
    save_file(scores, draft / "importance.safetensors")
    save_file({"input_ids": torch.randint(3, 264, (24, 10), generator=generator)}, draft / "windows.safetensors")
    store.commit(IMPORTANCE, draft, {"metrics": {}})
    model = save_tiny(folder / "model", num_hidden_layers=LAYERS)
    inputs = {"model": Input(FileHashes(None).of_folder(model), str(model)), "importance": IMPORTANCE.as_input()}
    settings = {"dtype": "bfloat16", "micro_batch_size": 1}
    if kind == "reference":
        return store, stage_of("reference", "tiny", settings, inputs)
    common = {"ratio": 0.15, "criterion": "entropy", "multiple_of": 1, "allocation": "uniform", "floor": 0.2}
    return store, stage_of(
        "prune", "tiny", {**common, "protect_first": 0, "protect_last": 0, **settings, **method}, inputs
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function for what a stage produces in one go."""
    results = {}

    def result(kind="prune", **method):
        key = str((kind, method))
        if key not in results:
            store, stage = prepare(tmp_path_factory.mktemp("whole"), kind, **method)
            assert ended(1, store, stage) == 0
            results[key] = files_of(store, stage)
        return results[key]

    return result


@pytest.mark.parametrize(("before", "after"), RANKS)
def test_a_refit_of_dense_layers_solves_none_twice(tmp_path, uninterrupted, logged, before, after):
    written = logged(RefittedLayers, "write", lambda _self, number, *_: number)
    store, stage = prepare(tmp_path, refit="dense")
    assert ended(before, store, stage, interrupt_at=2) == INTERRUPTED
    assert sorted(written()) == ["0", "1"]
    assert ended(after, store, stage) == 0
    assert sorted(written()) == ["0", "1", "2"]
    assert files_of(store, stage) == uninterrupted(refit="dense")


@pytest.mark.parametrize("refit", ["dense", "layerwise"])
def test_a_damaged_layer_of_a_refit_is_fitted_again(tmp_path, uninterrupted, logged, refit):
    written = logged(RefittedLayers, "write", lambda _self, number, *_: number)
    store, stage = prepare(tmp_path, refit=refit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "open_draft", lambda _self: (_ for _ in ()).throw(Interrupted))
        assert ended(1, store, stage) == INTERRUPTED
    file = store.work(stage.id) / "refit" / "layer-1.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert ended(2, store, stage) == 0
    assert written() == ["0", "1", "2", "1"]
    assert files_of(store, stage) == uninterrupted(refit=refit)
