"""Values that a training has reported to TensorBoard, read back from its files."""

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def require_reported(folder, lines):
    """Check that a folder has one run, which shows the records of a ``loss.jsonl``."""
    (run,) = folder.iterdir()
    events = EventAccumulator(str(run)).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(f"train/{key}" for key in lines[0] if key != "step")
    for tag in events.Tags()["scalars"]:
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        key = tag.removeprefix("train/")
        # Steps that are repeated after a death appear again, with the same values.
        assert sorted(set(points)) == [(line["step"], float(np.float32(line[key]))) for line in lines], tag
    return run.name
