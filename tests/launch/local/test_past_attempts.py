"""Past attempts on this machine, as logs, manifests and work folders record them."""

import os
import time

import pytest
from hfprune_launch.local import past_attempts as local
from hfprune_launch.local.logs import first_line, logs_below, mark_done
from hfprune_launch.stage.stage_file import Provenance, write_stage_file
from made_stages import stage_of

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Failure, Progress
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})


@pytest.fixture
def handle(tmp_path):
    return Store(tmp_path / "store").handle(STAGE.id)


@pytest.fixture
def logs(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def begin(handle, logs, number):
    write_stage_file(handle, STAGE, Provenance(RuntimeConfig(), {}, {}), number)
    log = logs / f"{STAGE.kind}-{STAGE.fingerprint}.{number}.log"
    log.write_text("")
    os.utime(log, (1000.0 * number, 1000.0 * number))
    return log


def past_attempts(stage, handle, logs):
    return local.past_attempts(stage, handle, logs_below(logs))


def told(handle, logs):
    return [(it.number, it.state, it.cause, it.logs) for it in past_attempts(STAGE, handle, logs)]


def test_a_stage_that_is_tried_until_it_is_made(handle, logs):
    assert told(handle, logs) == []
    first = begin(handle, logs, 1)
    assert told(handle, logs) == [(1, "open", "no end known", (first,))]
    Progress(handle.work).update("layers", 3, 4)
    (running,) = past_attempts(STAGE, handle, logs)
    assert running.message == "last sign of life: layers 3/4" and running.started <= running.ended
    handle.report_failure(Failure("input", "no such file", 0, 2000.0, 1))
    assert told(handle, logs) == [(1, "failed", "input", (first,))]
    second = begin(handle, logs, 2)
    assert told(handle, logs) == [(1, "failed", "cut off", (first,)), (2, "open", "no end known", (second,))]
    assert past_attempts(STAGE, handle, logs)[0].ended == 1000.0
    record = {"metrics": {}, "attempts": 2, "started": 2.0, "finished": 3.0, "wall_time_s": 1.0}
    handle.store.commit(STAGE, handle.open_draft(), record)
    handle.discard_work()
    assert told(handle, logs) == [(1, "failed", "cut off", (first,)), (2, "done", "done", (second,))]
    assert past_attempts(STAGE, handle, logs)[1].started == 2.0


def test_the_time_of_a_beginning_is_the_same_in_any_zone(handle, logs, monkeypatch):
    """A container's clock is often set to UTC where its host's is not."""
    before = int(time.time())
    try:
        monkeypatch.setenv("TZ", "UTC-5")
        time.tzset()
        begin(handle, logs, 1).write_text(first_line(STAGE, []))
        begin(handle, logs, 2).write_text("1970-01-02 05:00:00 prune, as earlier versions wrote it")
        begin(handle, logs, 3)
        assert past_attempts(STAGE, handle, logs)[1].started == 86_400
        monkeypatch.setenv("TZ", "UTC+3")
        time.tzset()
        assert before <= past_attempts(STAGE, handle, logs)[0].started <= time.time()
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_log_tells_when_an_attempt_began_and_on_how_many_ranks(handle, logs):
    """Only the first line that the backend writes says so; any other first line says nothing."""
    beginnings = {
        1: first_line(STAGE, ["python", "-m", "torch.distributed.run", "--nproc-per-node=3", "run.py"]),
        2: "Traceback (most recent call last):",
        3: "2026-13-77 12:00:00 prune",
    }
    before = int(time.time())
    for number, line in beginnings.items():
        begin(handle, logs, number).write_text(line)
    begin(handle, logs, 4)
    first, *others, _ = past_attempts(STAGE, handle, logs)
    assert first.ranks == 3 and before - 1 <= first.started <= first.ended + 1
    assert [(it.started, it.ranks) for it in others] == [(None, None)] * 2


def test_an_artifact_that_is_made_again_does_not_make_its_first_attempt_a_failure(handle, logs):
    first = begin(handle, logs, 1)
    mark_done(first)
    os.utime(first, (1000.0, 1000.0))
    second = begin(handle, logs, 2)
    assert told(handle, logs) == [(1, "done", "done", (first,)), (2, "open", "no end known", (second,))]
    assert past_attempts(STAGE, handle, logs)[0].ended == 1000.0
