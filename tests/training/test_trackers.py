"""What a training tells trackers, of which one stands for those that aren't installed."""

import os
import sys
from types import SimpleNamespace
from unittest.mock import Mock

from hfprune_dist.training.trackers import Trackers


def test_wandb_goes_on_with_a_run_after_a_death(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", "")
    monkeypatch.setenv("WANDB_RUN_ID", "of another stage")
    begun = []
    init = Mock(side_effect=lambda **_: begun.append(os.environ["WANDB_RUN_ID"]) or Mock())
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for name in ("one-recover-1a2b3c4d", "one-recover-1a2b3c4d", "another-recover-5e6f7a8b"):
        Trackers(["wandb"], tmp_path / name).close()
    assert begun == ["1a2b3c4d", "1a2b3c4d", "5e6f7a8b"]
    assert all(call.kwargs["resume"] == "allow" for call in init.call_args_list)
