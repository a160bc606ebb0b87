"""GPUs give the same bits each time: flags are set before CUDA starts, and no stage needs what they refuse."""

import os

import pytest
import torch
import yaml
from core_definition import OF_ONE_PASS
from hfprune_launch.stage import run as stage_run
from sweeps import make_inputs, planned
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import Ranks, run_in_threads, without_deepspeed

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.core import redraw
from hfprune_dist.distributed import world as worlds
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures.score_names import SCORES

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class StoppedError(Exception):
    """Raised instead of starting CUDA or a process group."""


@pytest.fixture
def flags(monkeypatch):
    """The flags as a rank sees them; they are restored afterwards."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    torch.set_float32_matmul_precision("high")  # as NVIDIA's containers set it
    yield lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        os.environ.get(WORKSPACE),
    )
    os.environ.pop(WORKSPACE, None)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


AS_THEY_WERE = (False, False, True, True, "high", True, None)


@pytest.mark.parametrize(
    ("on_gpu", "reproducible", "expected"),
    [
        (True, True, (True, False, False, False, "highest", False, ":4096:8")),
        (True, False, AS_THEY_WERE),
        (False, True, AS_THEY_WERE),
    ],
)
def test_flags_are_set_before_cuda_starts_and_only_where_they_are_needed(
    monkeypatch, flags, on_gpu, reproducible, expected
):
    seen = []

    def start(*_, **__):
        seen.append(flags())
        raise StoppedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", start)
    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    threads = torch.get_num_threads()
    with pytest.raises(StoppedError):
        worlds.join_world({"LOCAL_RANK": "0", "OMP_NUM_THREADS": str(threads)}, 1, reproducible=reproducible)
    assert seen == [expected]


def test_stages_whose_bits_are_promised_ask_for_them(monkeypatch, tmp_path):
    asked = {}

    def join(_environment, _minutes, *, reproducible):
        asked[kind] = reproducible
        raise StoppedError

    monkeypatch.setattr(worlds, "join_world", join)
    for kind in KINDS:
        with pytest.raises(StoppedError):
            stage_run.run_stage(Store(tmp_path).handle(f"{kind}/0123456789abcdef"), None, None)
    assert {kind for kind, reproducible in asked.items() if reproducible} == {"importance", "reference", "prune"}
    assert asked.keys() == KINDS.keys()


# Operations that raise on a GPU under deterministic algorithms: torch's own list (torch.use_deterministic_algorithms),
# and others that its CUDA kernels refuse. Conditional ones are judged by their arguments.
REFUSED = (
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward"),
    *("reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward", "nll_loss2d_backward"),
    *("_ctc_loss_backward", "_embedding_bag", "put", "put_", "histc", "kthvalue", "median", "nanmedian"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "index_reduce", "index_reduce_", "scatter_reduce"),
    *("scatter_reduce_", "segment_reduce"),
)
REFUSED_OF_FLOATS = ("cumsum", "cumsum_", "logcumsumexp", "_logcumsumexp")


class Refusals(TorchDispatchMode):
    """Records the names of operations that are called, and of those that a GPU would refuse."""

    def __init__(self):
        super().__init__()
        self.called, self.refused = set(), set()

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        name, options = function._schema.name.removeprefix("aten::"), kwargs or {}
        self.called.add(name)
        has_indices = len(function._schema.returns) == 2  # of medians
        is_float = name in REFUSED_OF_FLOATS and (options.get("dtype") or args[0].dtype).is_floating_point
        is_weighted = name == "bincount" and (len(args) > 1 or options.get("weights") is not None)
        if (name in REFUSED and ("median" not in name or has_indices)) or is_float or is_weighted:
            self.refused.add(name)
        return function(*args, **options)


class WatchedRank(Ranks):
    """One rank, whose operations are watched."""

    def __init__(self, watching):
        super().__init__(1)
        self._watching = watching

    def run(self, work):
        def watched(world):
            with self._watching:
                return work(world)

        return super().run(watched)


@pytest.mark.slow
def test_scoring_and_refits_need_nothing_that_gpus_refuse(monkeypatch, tmp_path):
    """Every criterion, every refit and both searches, on a model of two layers."""
    without_deepspeed(monkeypatch)
    monkeypatch.setattr(redraw, "cumulative", redraw.exact_cumulative)  # as on a GPU
    methods = ["fisher-refit", "surgeon-plain", "surgeon-any-shape"]
    config = make_inputs(tmp_path)
    settings = {"models": ["alpha"], "ratios": [0.2], "methods": methods, "recovery": {"method": "none"}}
    settings["calibration"] = {"path": "calibration.jsonl", "samples": 4, "sequence_length": 12, "shard_size": 1}
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | settings))
    _, plan = planned(config, importance__criteria=OF_ONE_PASS)
    store, seen = Store(tmp_path / "store"), Refusals()
    for stage in plan.stages.values():
        if KINDS[stage.kind].reproducible and all(store.handle(need).is_committed() for need in stage.needs):
            run_in_threads(store, stage, WatchedRank(seen))
            assert store.handle(stage.id).is_committed(), stage.label
    scored = {file.parent.parent.name for file in store.root.glob(f"*/*/{SCORES}")}
    assert scored == {"importance"} and {"cumsum_", "scatter_add_", "linalg_cholesky_ex"} <= seen.called
    assert seen.refused == set()
