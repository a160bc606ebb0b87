"""A folder whose sweep another version of the code planned."""

import json

from fake_slurm import PLAN, SCORES, Job
from hfprune_launch import sweep
from hfprune_launch.sweep_folder import Sweep
from made_stages import begun
from sweeps import in_process

from hfprune_dist.store.attempts import Ledger


def test_jobs_that_other_code_planned_are_shown_and_cancelled(store, tmp_path, fake):
    """Stages are compared by fingerprints, which today's code would compute in another way."""
    Sweep(PLAN, store, tmp_path).write_record()
    record = json.loads((tmp_path / "sweep.json").read_text())
    for stage in record["stages"]:
        stage["params"]["unknown"] = 1
    (tmp_path / "sweep.json").write_text(json.dumps({**record, "dense": {"a": {"parameters": 1, "sizes": {}}}}))
    begun(store, SCORES, time_minutes=1).record_job("101")
    fake.jobs["101"] = Job(Ledger(store).open_job(SCORES.id).intent.job_name, "RUNNING", nodes="n1")
    code, shown, _ = in_process(sweep.main, "--out", tmp_path, "--status")
    assert code == 0 and "101" in shown and "n1" in shown
    code, shown, _ = in_process(sweep.main, "--out", tmp_path, "--cancel")
    assert code == 0 and "cancelled 1 job: 101" in shown and not fake.live()
