"""The benchmark tells the unit of time, and in that unit a stage of nothing, a sweep's stages and the tests."""

import re

from hfprune_launch import bench
from hfprune_launch.sweep_folder import Sweep
from made_stages import begun, stage_of
from sweeps import in_process
from tiny import save_tiny

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Cause, End, Run


def test_stages_in_units_with_all_their_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ASSETS", tmp_path)
    monkeypatch.setattr(bench, "TESTS", tmp_path / "tests.xml")
    bench.TESTS.write_text('<testsuite name="pytest" errors="0" skipped="1" tests="1898" time="268.702" />')
    save_tiny(tmp_path / "llama")
    stages = [stage_of("prune", "a"), stage_of("prune", "b", {"ratio": 0.3}), stage_of("recover", "c")]
    plan = Plan({stage.id: stage for stage in stages}, (), tuple(stage.id for stage in stages))
    sweep = Sweep(plan, Store(tmp_path / "out" / "store"), tmp_path / "out")
    begun(sweep.store, stages[0])  # without an end: cut off
    for stage, causes in zip(stages, [[Cause.KILLED, Cause.DONE], [Cause.DONE], []], strict=True):
        for cause in causes:
            attempt = begun(sweep.store, stage)
            attempt.record_run(Run("7", 0, "n1", attempt.intent.created + 100))  # after it had waited in a queue
            attempt.close(End(cause, "", attempt.intent.created + 1000))
    sweep.write_record()
    code, shown, said = in_process(bench.main, sweep.out)
    assert code == 0, said
    lines = {name: numbers.split() for name, numbers in re.findall(r"^(\S.*?)  +(\d.*)$", shown, re.MULTILINE)}
    assert re.search(r"u = [\d.e-]+ s", shown) and lines["a stage that does nothing"][0] == "1"
    assert lines["prune"][:2] == ["2", "2700.0"] == lines[f"all of {sweep.out}"][:2]
    assert lines["all tests of the last run"][:2] == ["1,898", "268.7"] and len(lines) == 4
