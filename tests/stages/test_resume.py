"""A refit that ends early: another number of ranks does the rest, with the same bits, and no layer twice."""

import pytest
from forks import INTERRUPTED, on_ranks
from shapes import outcome, prepare, run

from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.stages.context import Context

LAYERS = 3
METHOD = {"allocation": "uniform", "structures": ["neurons"], "layers": LAYERS, "samples": 24, "ratio": 0.15}
METHOD |= {"floor": 0.2, "protect_first": 0, "protect_last": 0, "dtype": "bfloat16"}


class Interrupting(Interruption):
    """Asks all ranks to end when they check for an interruption the ``at``-th time."""

    def __init__(self, at):
        super().__init__()
        self._at = at

    def agreed(self, world):
        self._at -= 1
        return self._at == 0


def ended(ranks, store, stage, interruption=None):
    codes = on_ranks(ranks, lambda world: run(store, stage, world, interruption)).codes
    assert len(set(codes)) == 1, codes
    return codes[0]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return a function for the numbers of the layers that were fitted so far, in any process."""
    file, original = tmp_path / "log", RefittedLayers.write

    def write(self, number, *rest):
        original(self, number, *rest)
        with file.open("a") as stream:
            stream.write(f"{number}\n")

    monkeypatch.setattr(RefittedLayers, "write", write)
    return lambda: file.read_text().split()


def whole(folder, **method):
    store, stage = prepare(folder, **METHOD, **method)
    assert ended(1, store, stage) == 0
    return outcome(store, stage)


def test_an_interrupted_refit_solves_no_layer_twice(tmp_path, written):
    expected = whole(tmp_path / "whole", refit="dense")
    (tmp_path / "log").unlink()
    store, stage = prepare(tmp_path / "parts", **METHOD, refit="dense")
    assert ended(2, store, stage, Interrupting(2)) == INTERRUPTED
    assert sorted(written()) == ["0", "1"]
    assert ended(1, store, stage) == 0
    assert sorted(written()) == ["0", "1", "2"]
    assert outcome(store, stage) == expected


def test_a_damaged_layer_of_a_refit_is_fitted_again(tmp_path, written):
    expected = whole(tmp_path / "whole", refit="layerwise")
    (tmp_path / "log").unlink()
    store, stage = prepare(tmp_path / "damaged", **METHOD, refit="layerwise")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "open_draft", lambda _self: (_ for _ in ()).throw(Interrupted))
        assert ended(1, store, stage) == INTERRUPTED
    file = store.work(stage.id) / "refit" / "layer-1.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert ended(2, store, stage) == 0
    assert written() == ["0", "1", "2", "1"] and outcome(store, stage) == expected
