"""The backend's decisions, with fake commands in place of Slurm."""

import io
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_slurm import HEADER, Clock, Controller, Job
from hfprune_launch.project import PROJECT
from hfprune_launch.slurm import cli
from hfprune_launch.slurm.attempt_records import GONE, End, Run
from hfprune_launch.slurm.attempts import Attempts
from hfprune_launch.slurm.backend import SlurmBackend
from hfprune_launch.slurm.cancel import cancel_jobs
from hfprune_launch.slurm.cli import NewJobs, Sweep, run_on_slurm, show_status
from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.job_ends import JobEnds
from hfprune_launch.slurm.profile import Profile, Resources
from hfprune_launch.slurm.submission import Submitting
from hfprune_launch.slurm.sweep_jobs import Event
from hfprune_launch.stage.stage_file import Provenance
from made_stages import stage_of
from rich.console import Console
from sweeps import make_inputs, sweep

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.cancellation import Cancellation
from hfprune_dist.store.claims import try_claim
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

SCORES = stage_of("importance", "a", {}, {"model": Input("digest", "/model")})
PRUNES = [stage_of("prune", f"a {r}", {"ratio": r}, {"importance": SCORES.as_input()}) for r in (0.2, 0.3)]


def plan_of(*stages):
    """Return a plan without rows in which all stages are wanted."""
    return Plan({stage.id: stage for stage in stages}, (), asked=tuple(stage.id for stage in stages))


PLAN = plan_of(SCORES, *PRUNES)
TRIED_AGAIN = {"101": "CANCELLED", "102": "RUNNING"}
RESOURCES = dict.fromkeys(("importance", "reference", "prune", "recover", "evaluate"), Resources())


@pytest.fixture
def fake(monkeypatch):
    return Controller().install(monkeypatch)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def make_backend(store, plan=PLAN, max_running=None, resources=RESOURCES):
    told = []
    submitting = Submitting(
        Provenance(RuntimeConfig(), {}, {}),
        Profile("test", resources, None),
        store.root / "code",
        max_running,
        Cancellation(store.root),
    )
    clock = Clock()
    backend = SlurmBackend(store, plan, submitting, SlurmCommands(sleep=clock.sleep), told.append, clock=clock)

    def step_after(seconds):
        clock.sleep(seconds)
        backend.step()

    return SimpleNamespace(
        start=backend.start,
        step=backend.step,
        step_after=step_after,
        follow=lambda: backend.follow(lambda: None, clock.sleep),
        follow_missing=lambda: backend.follow_missing(lambda: None, clock.sleep),
        unsubmitted=backend.unsubmitted,
        told=told,
        clock=clock,
    )


def complete(store, stage, seconds=1.0):
    draft = store.open_draft(stage.id)
    (draft / "result").write_text("x")
    store.commit(stage, draft, {"metrics": {}, "wall_time_s": seconds})


def script_of(store, stage, number=1):
    return (store.root / "attempts" / stage.id / str(number) / "job.sh").read_text()


def causes(store, stage):
    return [attempt.end.cause if attempt.end else None for attempt in Attempts(store.root).of(stage.id)]


def test_dependencies_become_slurms(fake, store):
    make_backend(store).start()
    assert list(fake.jobs) == ["101", "102", "103"]
    assert "--dependency" not in script_of(store, SCORES)
    for stage in PRUNES:
        assert "#SBATCH --dependency=afterok:101\n" in script_of(store, stage)
        assert "#SBATCH --kill-on-invalid-dep=yes" in script_of(store, stage)


def test_paths_are_said_in_one_piece_on_any_terminal(fake, store, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "take_snapshot", lambda *_: tmp_path / "code")
    console, profile = Console(width=40, file=io.StringIO()), Profile("test", RESOURCES, None)
    jobs = NewJobs(Provenance(RuntimeConfig(), {}, {}), profile, None, PROJECT, Cancellation(store.root))
    swept = Sweep(PLAN, store, tmp_path)
    assert run_on_slurm(console, swept, list(PLAN.stages), jobs, follow=False, on_end=lambda: None) == 0
    assert f"3 of 3 stages to run on Slurm; logs in {store.root / 'attempts'}\n" in console.file.getvalue()


def test_what_is_done_or_queued_is_not_submitted_again(fake, store):
    complete(store, SCORES)
    make_backend(store).start()
    make_backend(store).start()
    assert len(fake.calls("sbatch")) == 2
    assert "--dependency" not in script_of(store, PRUNES[0])


def test_jobs_are_told_of_in_the_order_of_the_plan(fake, store):
    stages = [stage_of("prune", str(number), {"number": number}, {}) for number in range(6)]
    make_backend(store, plan_of(*stages)).start()
    for job_id in fake.jobs:
        fake.set_state(job_id, "PENDING", nodes="", reason="PartitionDown")
    backend = make_backend(store, plan_of(*stages))
    backend.start()
    assert [event.message for event in backend.told] == ["6 jobs can't start: PartitionDown (101, 102, 103, ...)"]


def test_only_an_artifact_is_success(fake, store):
    backend = make_backend(store)
    backend.start()
    complete(store, SCORES)
    fake.set_state("101", "FAILED")
    fake.set_state("102", "COMPLETED")
    backend.step()
    assert causes(store, SCORES) == ["done"]
    for _ in range(9):  # an artifact may become visible here only some time after its job has ended
        assert causes(store, PRUNES[0]) == [None]
        backend.step_after(7)
    assert causes(store, PRUNES[0])[0] == "killed"


def test_retries_are_bounded(fake, store):
    backend = make_backend(store, plan_of(SCORES))
    backend.start()
    for _ in range(10):
        for job_id in fake.jobs:
            fake.set_state(job_id, "FAILED")
        backend.step()
    assert causes(store, SCORES) == ["killed"] * 3
    make_backend(store, plan_of(SCORES)).start()
    assert len(causes(store, SCORES)) == 4, "the same command tries again"


def drop(fake, *job_ids):
    """Let Slurm cancel jobs because one on which they depend did not succeed."""
    for job_id in job_ids:
        fake.set_state(job_id, "CANCELLED", nodes="", reason="DependencyNeverSatisfied")


def test_a_cancelled_job_waits_for_the_user(fake, store):
    backend = make_backend(store)
    backend.start()
    attempts = Attempts(store.root)
    attempts.last(SCORES.id).record_run(Run("101", 0, "n1", time.time()))
    fake.set_state("101", "CANCELLED")
    drop(fake, "102", "103")
    backend.follow()
    assert causes(store, SCORES) == ["cancelled"] and causes(store, PRUNES[0]) == ["not run"]
    assert len(fake.calls("sbatch")) == 3
    make_backend(store).start()
    assert len(fake.calls("sbatch")) == 6


def test_a_job_that_was_cancelled_while_it_waited_for_another_is_not_submitted_again(fake, store):
    backend = make_backend(store)
    backend.start()
    fake.set_state("102", "CANCELLED", nodes="", reason="Dependency")
    backend.step()
    assert causes(store, PRUNES[0]) == ["cancelled"] and len(fake.calls("sbatch")) == 3


def test_a_job_that_went_with_one_that_died_after_its_work_is_submitted_again(fake, store):
    backend = make_backend(store)
    backend.start()
    complete(store, SCORES)
    fake.set_state("101", "NODE_FAIL")
    drop(fake, "102")
    backend.step()
    assert causes(store, SCORES) == ["done"] and causes(store, PRUNES[0]) == ["not run", None]
    assert "--dependency" not in script_of(store, PRUNES[0], 2)


def test_dependents_follow_a_retry(fake, store):
    backend = make_backend(store)
    backend.start()
    fake.set_state("101", "NODE_FAIL", "n3")
    drop(fake, "102", "103")
    Attempts(store.root).last(SCORES.id).record_run(Run("101", 0, "n3", time.time()))
    backend.step()
    assert "#SBATCH --exclude=n3" in script_of(store, SCORES, 2)
    assert "--dependency=afterok:104\n" in script_of(store, PRUNES[0], 2)


def test_a_job_whose_id_was_never_written_is_adopted(fake, store):
    make_backend(store).start()
    for job in (store.root / "attempts").glob("*/*/1/job.json"):
        job.unlink()
    backend = make_backend(store)
    backend.start()
    assert len(fake.calls("sbatch")) == 3
    assert {event.what for event in backend.told} == {"adopted"}
    assert Attempts(store.root).last(SCORES.id).job_id == "101"


def test_an_intent_that_came_to_nothing_is_submitted_again(fake, store):
    Attempts(store.root).begin(SCORES, 0, 1, 60, None)
    make_backend(store).start()
    assert causes(store, SCORES) == ["not run", None]


def test_of_jobs_with_one_name_the_live_one_is_adopted(fake, store):
    """A submission was tried again and its first job cancelled; squeue lists neither of them at first."""
    attempt = Attempts(store.root).begin(SCORES, 0, 1, 60, None)
    fake.jobs = {number: Job(attempt.intent.job_name, state) for number, state in TRIED_AGAIN.items()}
    fake.listings = [HEADER]
    make_backend(store).start()
    assert Attempts(store.root).last(SCORES.id).job_id == "102" and causes(store, SCORES) == [None]


def test_a_launcher_that_is_submitting_is_left_alone(fake, store):
    Attempts(store.root).begin(SCORES, 0, 1, 60, None)
    claim = try_claim(store.work(SCORES.id))
    make_backend(store).start()
    assert causes(store, SCORES) == [None] and fake.calls("sbatch") == []
    claim.release()


def test_a_job_that_noted_its_own_start_needs_no_squeue(fake, store):
    attempt = Attempts(store.root).begin(SCORES, 0, 1, 60, None)
    attempt.record_run(Run("55", 0, "n1", time.time()))
    complete(store, SCORES)
    make_backend(store).start()
    backend = make_backend(store)
    backend.start()
    assert fake.calls("sbatch") and "importance" not in " ".join(fake.calls("sbatch"))


def test_a_new_cluster_may_give_an_id_again(fake, store):
    attempt = Attempts(store.root).begin(SCORES, 0, 1, 60, None)
    attempt.record_job("7")
    fake.jobs["7"] = Job("somebody-else", "RUNNING")
    backend = make_backend(store)
    backend.start()
    assert causes(store, SCORES) == [None], "it might be a job of another cluster"
    backend.follow_missing()
    assert causes(store, SCORES) == ["killed", None]
    assert 180 <= backend.clock.now < 300


@pytest.mark.parametrize("answers", [[HEADER], [HEADER] * 5, ["", HEADER], [HEADER, None, HEADER]])
def test_a_job_that_squeue_does_not_list_is_not_dead(fake, store, answers):
    backend = make_backend(store)
    backend.start()
    for job_id in fake.jobs:
        fake.set_state(job_id, "RUNNING")
    fake.listings = [*answers]
    for _ in answers:
        backend.step_after(500)
    assert causes(store, SCORES) == causes(store, PRUNES[0]) == [None]
    assert len(fake.calls("sbatch")) == 3 and not backend.told[3:]


def test_the_end_of_a_job_that_slurm_has_forgotten_is_accountings(fake, store):
    backend = make_backend(store)
    backend.start()
    name = fake.jobs["101"].name
    fake.history = f"101|OUT_OF_MEMORY|None|n1|N/A|N/A|{name}\n102|FAILED|None|n1|N/A|N/A|other\n"
    backend.step_after(1)
    assert causes(store, SCORES) == [None], "accounting may still show an earlier start of a requeued job"
    fake.forget("101", "102")
    backend.step_after(1)
    assert causes(store, SCORES) == ["out of memory"] and causes(store, PRUNES[0]) == [None]


def test_without_accounting_a_forgotten_job_is_over_after_minutes_without_a_sign_of_life(fake, store):
    plan = Plan({SCORES.id: SCORES}, (), (SCORES.id,))
    backend = make_backend(store, plan)
    backend.start()
    fake.forget("101")
    for done in range(5):
        Progress(store.work(SCORES.id)).update("calibration", done, 5)
        backend.step_after(100)
        assert causes(store, SCORES) == [None], "its heartbeat goes on"
    claim = try_claim(store.work(SCORES.id), job="101")
    for _ in range(5):
        backend.step_after(100)
        assert causes(store, SCORES) == [None], "it holds its claim"
    claim.release()
    for _ in range(2):
        backend.step_after(100)
    assert causes(store, SCORES) == ["killed", None]
    assert Attempts(store.root).of(SCORES.id)[0].end.state == "GONE"


def test_where_the_controller_does_not_answer_nothing_is_over(fake, store):
    backend = make_backend(store)
    backend.start()
    fake.forget("101", "102", "103")
    fake.fail_next("scontrol", *["scontrol: error: Unable to contact slurm controller"] * 50)
    for _ in range(2):
        backend.step_after(200)
    assert causes(store, SCORES) == [None]


def test_a_job_that_said_itself_that_it_ended_is_over_once_slurm_knows_none(fake, store):
    attempt = Attempts(store.root).begin(SCORES, 0, 1, 60, None)
    attempt.record_job("101")
    attempt.record_run(Run("101", 0, "n1", 1000.0, 1010.0, "failed"))
    make_backend(store).start()
    assert causes(store, SCORES) == ["killed", None]


def test_only_jobs_that_are_over_lose_their_claims(fake, store):
    attempts = Attempts(store.root)
    ends = [End("killed", "", 0.0), End("killed", "", 0.0, state="FAILED"), End("killed", "", 0.0, state=GONE)]
    for number, end in enumerate(ends, 5):
        attempt = attempts.begin(SCORES, 0, 1, 60, None)
        attempt.record_job(str(number))
        attempt.close(end)
    assert attempts.ended_jobs(SCORES.id) == {"6", "7"}
    attempts.begin(SCORES, 0, 1, 60, None).record_job("7")
    assert attempts.ended_jobs(SCORES.id) == {"6"}, "another cluster gave the id again"


def test_a_job_without_an_id_is_never_submitted_again_before_it_is_looked_for(fake, store):
    """sbatch accepted the job but printed nothing, and squeue does not list it for a while."""
    fake.answer = ""
    plan = Plan({SCORES.id: SCORES}, (), (SCORES.id,))
    backend = make_backend(store, plan)
    fake.listings = [None, *[HEADER] * 12]
    backend.start()
    for _ in range(3):
        backend.step_after(10)
    assert len(fake.calls("sbatch")) == 1 and causes(store, SCORES) == [None]
    backend.step_after(10)
    assert Attempts(store.root).last(SCORES.id).job_id == "101"


def test_a_job_that_did_not_arrive_is_cancelled_by_name_before_the_next(fake, store):
    attempt = Attempts(store.root).begin(SCORES, 0, 1, 60, None)
    (attempt.folder / "job.sh").write_text("#!/bin/bash\n")
    make_backend(store).start()
    assert causes(store, SCORES) == ["not run", None]
    calls = [call.split()[0] for call in fake.calls() if call.startswith(("scancel", "sbatch"))]
    assert calls[:2] == ["scancel", "sbatch"] and f"scancel --jobname={attempt.intent.job_name}" in fake.calls()


def test_a_need_that_is_made_meanwhile_is_no_dependency(fake, store, monkeypatch):
    """The submission outlasts MinJobAge: the needed job has ended, and Slurm has forgotten it."""
    plan = Plan({SCORES.id: SCORES, PRUNES[0].id: PRUNES[0]}, (), (SCORES.id, PRUNES[0].id))
    submit = SlurmCommands.submit

    def slowly(self, script, job_name):
        job_id = submit(self, script, job_name)
        complete(store, SCORES)
        fake.forget("101")
        return job_id

    monkeypatch.setattr(SlurmCommands, "submit", slowly)
    make_backend(store, plan).start()
    assert "--dependency" not in script_of(store, PRUNES[0]) and causes(store, PRUNES[0]) == [None]


def test_a_need_that_died_meanwhile_is_made_again(fake, store):
    """Slurm refuses the dependent job, which is not to blame."""
    plan = Plan({SCORES.id: SCORES, PRUNES[0].id: PRUNES[0]}, (), (SCORES.id, PRUNES[0].id))
    backend = make_backend(store, plan)
    sbatch = fake.sbatch

    def forget_first(submission, fault):
        if "afterok:101" in Path(submission[-1]).read_text():
            fake.jobs.pop("101", None)
        return sbatch(submission, fault)

    fake.sbatch = forget_first
    backend.start()
    assert causes(store, PRUNES[0]) == ["not accepted"] and causes(store, SCORES) == [None]
    assert "ended" not in [event.what for event in backend.told]
    for _ in range(5):
        backend.step_after(100)
    assert causes(store, SCORES) == ["killed", None] and causes(store, PRUNES[0]) == [None], "the same attempt"
    assert "--dependency=afterok:102\n" in script_of(store, PRUNES[0])


@pytest.mark.parametrize("refusal", ["Requested node configuration is not available", "Invalid node name specified"])
def test_a_node_at_fault_that_slurm_does_not_do_without_is_not_avoided(fake, store, refusal):
    """The partition has no other, or the node is gone from Slurm's configuration."""
    plan = plan_of(SCORES)
    backend = make_backend(store, plan)
    backend.start()
    Attempts(store.root).last(SCORES.id).record_run(Run("101", 0, "n3", time.time()))
    fake.set_state("101", "NODE_FAIL", "n3")
    fake.fail_next("sbatch", f"sbatch: error: Batch job submission failed: {refusal}")
    backend.step()
    assert causes(store, SCORES) == ["bad node", None] and "--exclude" not in script_of(store, SCORES, 2)
    (told,) = [event.message for event in backend.told if event.what == "waiting"]
    assert refusal in told and "can't do without n3" in told
    again = make_backend(store, plan)
    again.start()
    assert again.told == [], "the job waits as this command would submit it"
    fake.set_state("102", "NODE_FAIL", "n3")
    fake.fail_next("sbatch", *["sbatch: error: Invalid account"] * 2)
    backend.step()
    assert causes(store, SCORES) == ["bad node", "bad node", "input"]


def test_a_node_at_fault_without_which_slurm_starts_no_job_is_not_avoided(fake, store):
    """Slurm accepts a job that avoids the only node of a partition, and ends it."""
    backend = make_backend(store, plan_of(SCORES))
    backend.start()
    Attempts(store.root).last(SCORES.id).record_run(Run("101", 0, "n3", time.time()))
    fake.set_state("101", "NODE_FAIL", "n3")
    backend.step()
    assert "#SBATCH --exclude=n3\n" in script_of(store, SCORES, 2)
    fake.set_state("102", "FAILED", nodes="", reason="BadConstraints")
    backend.step()
    assert causes(store, SCORES) == ["bad node", "not run", None]
    assert "--exclude" not in script_of(store, SCORES, 3)
    assert "can't do without n3" in backend.told[-2].message


HELD = "launch failed requeued held"


def test_a_job_that_could_not_be_launched_is_tried_elsewhere(fake, store):
    plan = Plan({SCORES.id: SCORES}, (), (SCORES.id,))
    backend = make_backend(store, plan)
    backend.start()
    for number in range(6):
        job_id = str(101 + number)
        fake.set_state(job_id, "PENDING", nodes="", reason=HELD)
        fake.history = f"{job_id}|REQUEUED|None|n{number}|N/A|N/A|x\n"
        backend.step_after(1)
        assert fake.calls("scancel")[-1] == f"scancel {job_id}"
        fake.set_state(job_id, "CANCELLED")
        backend.step_after(1)
    assert causes(store, SCORES) == ["bad node"] * 6, "bounded"
    assert [failure.cause for failure in store.handle(SCORES.id).failures()] == ["bad node"], "for the report"
    assert "#SBATCH --exclude=n0,n1,n2\n" in script_of(store, SCORES, 4), script_of(store, SCORES, 4)
    told = [event.message for event in backend.told if event.what == "ended"]
    assert "could not be started on n0" in told[0] and HELD in told[0]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("REQUEUE_HOLD", "launch failure limit exceeded requeued held"),  # from MaxBatchRequeue
        ("PENDING", "user env retrieval failed requeued held"),
    ],
)
def test_a_job_that_slurm_holds_after_failed_launches_is_tried_again(fake, store, state, reason):
    backend = make_backend(store)
    backend.start()
    fake.set_state("101", state, nodes="", reason=reason)
    backend.step_after(1)
    assert fake.calls("scancel") == ["scancel 101"]
    fake.set_state("101", "CANCELLED")
    backend.step_after(1)
    assert causes(store, SCORES) == ["bad node", None]


def test_a_dependency_that_can_never_be_satisfied_is_not_waited_for(fake, store):
    backend = make_backend(store)
    backend.start()
    fake.set_state("102", "PENDING", nodes="", reason="DependencyNeverSatisfied")
    for _ in range(3):
        backend.step_after(40)
    assert fake.calls("scancel") == ["scancel 102"]
    fake.set_state("102", "CANCELLED")
    backend.step_after(1)
    assert causes(store, PRUNES[0]) == ["not run", None]


def test_why_jobs_wait_is_said_once(fake, store):
    complete(store, SCORES)
    backend = make_backend(store)
    backend.start()

    def waits(reason, times, every=10):
        for job_id in fake.jobs:
            fake.set_state(job_id, "PENDING", nodes="", reason=reason)
        for _ in range(times):
            backend.step_after(every)

    for reason in ("Priority", "Resources", "PartitionDown", "ReqNodeNotAvail, UnavailableNodes:n[1-2]", "Priority"):
        waits(reason, 5)
    waits("Resources", 8, every=50)
    waits("JobHeldUser", 9, every=500)
    told = [event.message for event in backend.told if event.what == "waiting"]
    assert [message.split(": ")[1].split(" ")[0] for message in told] == [
        *("PartitionDown", "ReqNodeNotAvail", "Resources", "JobHeldUser", "JobHeldUser")
    ]
    assert "2 jobs" in told[0] and "101, 102" in told[0] and "for 5 min" in told[2] and "scontrol release" in told[3]
    assert fake.calls("scancel") == [], "who holds a job means it"


def told_of_waiting(fake, store, state, reason):
    """What is told once the only job waits in a state, for a reason."""
    backend = make_backend(store)
    backend.start()
    fake.set_state("101", state, nodes="", reason=reason)
    backend.step_after(1)
    return [event.message for event in backend.told if event.what == "waiting"]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "ReqNodeNotAvail"),
        ("ReqNodeNotAvail,_UnavailableNodes:n[1-2]", "ReqNodeNotAvail"),
        *[("ReqNodeNotAvail, Reserved for maintenance",) * 2],
        *[("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",) * 2],
    ],
)
def test_a_reason_is_said_without_its_nodes_but_else_whole(fake, store, reason, said):
    assert told_of_waiting(fake, store, "PENDING", reason) == [f"1 job can't start: {said} (101)"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("RESV_DEL_HOLD", "Reservation week4 was deleted"),
        ("SPECIAL_EXIT", "job requeued in special exit state"),
        ("PENDING", "job requeued in held state"),
    ],
)
def test_why_slurm_holds_a_job_is_said(fake, store, state, reason):
    (told,) = told_of_waiting(fake, store, state, reason)
    assert reason in told and ("scontrol release" in told) == ("requeued" in reason)
    assert fake.calls("scancel") == []


def test_never_more_lanes_than_max_running(fake, store):
    complete(store, SCORES)
    plan = plan_of(SCORES, *(stage_of("prune", str(n), {"n": n}, {"i": SCORES.as_input()}) for n in range(5)))
    make_backend(store, plan, max_running=2).start()
    waits = [script_of(store, stage) for stage in plan.stages.values() if stage is not SCORES]
    found = [[line for line in script.splitlines() if "dependency" in line] for script in waits]
    assert found == [[], [], *([f"#SBATCH --dependency=afterany:{job}"] for job in (101, 102, 103))]


def test_jobs_of_commands_with_other_plans_count_for_max_running(fake, store):
    plans = [
        plan_of(*(stage_of("prune", f"{plan} {n}", {"n": n, "plan": plan}, {}) for n in range(2))) for plan in "abcd"
    ]
    first, second, third, fourth = [make_backend(store, plan, max_running=2) for plan in plans]
    first.start()
    second.start()
    waits = [script_of(store, stage).count("--dependency=afterany:10") for stage in plans[1].stages.values()]
    assert waits == [1, 1] and len(fake.calls("sbatch")) == 4
    for job_id in ("101", "102", "103"):
        fake.set_state(job_id, "COMPLETED")
    third.start()
    waits = [script_of(store, stage).count("--dependency=afterany:104") for stage in plans[2].stages.values()]
    assert waits == [0, 1], "one slot is free, and the job that waits in the other one comes first"
    for job_id in ("104", "105", "106"):  # over, and forgotten before any launcher could record how they ended
        del fake.jobs[job_id]
    fourth.start()
    waits = [script_of(store, stage).count("--dependency") for stage in plans[3].stages.values()]
    assert waits == [0, 0] and len(fake.calls("sbatch")) == 8, "nothing waits for a job that Slurm no longer knows"


@pytest.mark.parametrize("second_begins", ["before the first has looked", "while the first submits"])
def test_launchers_that_start_together_take_different_slots(fake, store, monkeypatch, second_begins):
    """The limit is for all of them, whether their plans differ or not."""
    plans = [
        plan_of(*(stage_of("prune", f"{name} {n}", {"n": n, "plan": name}, {}) for n in range(2))) for name in "aba"
    ]
    first, *others = [make_backend(store, plan, max_running=1) for plan in plans]
    looked = [threading.Event() for _ in others]
    threads = [threading.Thread(target=it.start) for it in others]
    submit, look = SlurmCommands.submit, JobEnds.take_up_earlier

    def looks(self):
        look(self)
        if threading.current_thread() in threads:
            looked[threads.index(threading.current_thread())].set()
            first_may_go_on.wait()

    def begin_the_others():
        for thread, event in zip(threads, looked, strict=True):
            thread.start()
            assert event.wait(60)

    def submits(self, script, job_name):
        if threading.current_thread() is threading.main_thread() and not first_may_go_on.is_set():
            begin_the_others()
            first_may_go_on.set()
            threads[0].join(1.0)  # in vain, as it has to wait
        return submit(self, script, job_name)

    first_may_go_on = threading.Event()
    monkeypatch.setattr(JobEnds, "take_up_earlier", looks)
    monkeypatch.setattr(SlurmCommands, "submit", submits)
    if second_begins == "before the first has looked":
        begin_the_others()
        monkeypatch.setattr(SlurmCommands, "submit", submit)
    first.start()
    first_may_go_on.set()
    for thread in threads:
        thread.join(60)
    stages = [stage for plan in plans[:2] for stage in plan.stages.values()]
    waits = [re.findall("--dependency=(.*)", script_of(store, stage)) for stage in stages]
    assert waits == [[], ["afterany:101"], ["afterany:102"], ["afterany:103"]] and len(fake.calls("sbatch")) == 4


def test_nothing_joins_a_slot_whose_last_job_has_no_known_id(fake, store):
    """Slurm accepted a job without printing its id, or another launcher is submitting one."""
    complete(store, SCORES)
    fake.answer = ""
    fake.listings = [*[HEADER] * 8]
    backend = make_backend(store, max_running=1)
    backend.start()
    assert len(fake.calls("sbatch")) == 1
    fake.listings, fake.answer = [], "ID\n"
    backend.step()
    assert len(fake.calls("sbatch")) == 2
    assert "#SBATCH --dependency=afterany:101" in script_of(store, PRUNES[1])


@pytest.mark.parametrize("now", [{"resources": dict.fromkeys(RESOURCES, Resources(qos="long"))}, {"max_running": 2}])
def test_jobs_that_wait_as_an_earlier_command_submitted_them_are_told_of(fake, store, tmp_path, now):
    complete(store, SCORES)
    make_backend(store).start()
    fake.set_state("102", "RUNNING")

    def told(store, **settings):
        backend = make_backend(store, **settings)
        backend.start()
        return [event.message for event in backend.told]

    (alias := tmp_path / "alias").symlink_to(store.root)
    assert told(store) == told(Store(alias)) == []
    (message,) = told(store, **now)
    assert message.startswith("1 queued job keeps to the profile") and "--cancel" in message


def test_what_only_results_that_stand_were_made_from_is_not_submitted(fake, store):
    plan = Plan(PLAN.stages, (), asked=tuple(stage.id for stage in PRUNES))
    complete(store, PRUNES[0])
    complete(store, PRUNES[1])
    make_backend(store, plan).start()
    assert fake.calls("sbatch") == [] and causes(store, SCORES) == []


def test_a_full_queue_is_filled_up_later(fake, store):
    fake.fail_next("sbatch", "sbatch: error: AssocMaxSubmitJobLimit")
    backend = make_backend(store)
    backend.start()
    assert causes(store, SCORES) == ["not accepted"]
    assert [event.what for event in backend.told] == ["waiting"], "as a message that is printed once"
    assert backend.unsubmitted() == list(PLAN.stages.values())
    backend.step()
    assert causes(store, SCORES) == [None], "the same attempt"
    assert len(fake.jobs) == 3 and backend.unsubmitted() == []


def test_a_limit_that_may_never_be_met_is_told_as_such(fake, store):
    fake.fail_next("sbatch", *["sbatch: error: AssocMaxSubmitJobLimit"] * 2)
    backend = make_backend(store)
    backend.start()
    assert "the limit allows none, or other users' jobs reach it" in backend.told[-1].message
    fake.jobs["999"] = Job("mine", "RUNNING")
    backend.step()
    assert backend.told[-1].message.endswith("the rest is submitted when jobs have ended")


def test_what_a_sweep_waits_for_is_told_again_after_an_hour(store, tmp_path, capsys):
    clock = Clock()
    screen = cli._Screen(Console(width=200), Sweep(PLAN, store, tmp_path), clock)
    for seconds, lines in ((0.0, 1), (10.0, 1), (3580.0, 1), (10.0, 2), (10.0, 2)):
        clock.sleep(seconds)
        screen.tell(Event("waiting", SCORES, None, "AssocMaxSubmitJobLimit"))
        said = capsys.readouterr().out
        print(said, end="")
        assert said.count("AssocMaxSubmitJobLimit") == lines


def test_a_refused_job_keeps_back_only_what_needs_it(fake, store):
    complete(store, SCORES)
    fake.fail_next("sbatch", "sbatch: error: Invalid account")
    backend = make_backend(store)
    backend.start()
    assert causes(store, PRUNES[0]) == ["input"] and causes(store, PRUNES[1]) == [None]


def test_cancel_ends_the_sweeps_jobs_only(fake, store):
    make_backend(store).start()
    fake.jobs["999"] = Job("mine", "RUNNING")
    assert cancel_jobs(PLAN, store, SlurmCommands(), lambda _: None).job_ids == ["101", "102", "103"]
    assert fake.calls("scancel") == ["scancel 101 102 103"]


def test_cancelled_jobs_are_named_in_the_order_of_their_numbers(fake, store):
    fake.submitted = -2
    make_backend(store).start()
    assert cancel_jobs(PLAN, store, SlurmCommands(), lambda _: None).job_ids == ["99", "100", "101"]


def test_cancel_finds_what_is_outside_the_plan_unlisted_or_without_an_id(fake, store):
    make_backend(store).start()
    attempts = Attempts(store.root)
    (attempts.last(PRUNES[0].id).folder / "job.json").unlink()
    lost = attempts.begin(stage_of("evaluate", "x", {}, {}), 0, 1, 60, None)
    fake.listings = [HEADER + "".join(f"{job.line(i)}|;\n" for i, job in fake.jobs.items() if i != "103")]
    cancelled = cancel_jobs(Plan({SCORES.id: SCORES}, (), (SCORES.id,)), store, SlurmCommands(), lambda _: None)
    assert cancelled.job_ids == ["101", "102", "103"]
    assert cancelled.outside == sorted(stage.id for stage in PRUNES)
    assert fake.calls("scancel") == ["scancel 101 102 103", f"scancel --jobname={lost.intent.job_name}"]


def test_dry_run_prints_what_would_be_submitted_where_there_is_no_slurm(tmp_path):
    config = make_inputs(tmp_path)
    result = sweep(
        config,
        tmp_path / "out",
        "--profile",
        "example-gpu",
        "--dry-run",
        "--set",
        "recovery.batch_size=32",
        environment={"PATH": "/usr/bin-without-slurm"},
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "out").exists()
    assert result.stdout.count("#!/bin/bash") == 22 and "#SBATCH --gpus-per-node=8" in result.stdout
    assert "srun --unbuffered" in result.stdout and "--kill-on-bad-exit=1" in result.stdout
    assert "#SBATCH --dependency='afterok:<job of importance/" in result.stdout
    importance, reference, prune = 2 * 8 * 4, 2 * 8 * 4, 4 * 8 * 4  # stages * GPUs * hours
    recover, evaluate = 6 * 8 * 12, 8 * 8 * 2
    assert importance + reference + prune + recover + evaluate == 960
    assert "at most 960.0 GPU-hours" in result.stdout


def test_no_slurm_is_one_clear_message(tmp_path):
    config = make_inputs(tmp_path)
    result = sweep(
        config, tmp_path / "out", "--profile", "local-cluster", environment={"PATH": "/usr/bin-without-slurm"}
    )
    assert result.returncode == 2 and "no sbatch on this machine" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_status_says_at_once_that_slurm_does_not_answer(fake, store, tmp_path, capsys):
    make_backend(store).start()
    before = len(fake.calls("squeue"))
    fake.fail_next("squeue", *["slurm_load_jobs error: Unable to contact slurm controller"] * 9)
    show_status(Console(width=200), Sweep(PLAN, store, tmp_path), keep_on=False)
    shown = capsys.readouterr().out
    assert "Slurm does not answer" in shown and shown.count(" submitted  ") == 3 and "missing" not in shown
    assert len(fake.calls("squeue")) == before + 1


def test_status_is_followed_while_slurm_does_not_answer(fake, store, tmp_path, monkeypatch, capsys):
    make_backend(store).start()
    fake.fail_next("squeue", *["slurm_load_jobs error: Unable to contact slurm controller"] * 6)
    rounds = iter(range(8))
    monkeypatch.setattr(cli, "sleep", lambda _: next(rounds))
    with pytest.raises(StopIteration):
        show_status(Console(width=200), Sweep(PLAN, store, tmp_path), keep_on=True)
    assert capsys.readouterr().out.count("Slurm does not answer") == 1


def test_status_asks_about_jobs_that_squeue_does_not_list(fake, store, tmp_path, capsys):
    make_backend(store).start()
    fake.set_state("101", "RUNNING")
    fake.listings = [HEADER]
    files = sorted(store.root.rglob("*"))
    show_status(Console(width=200), Sweep(PLAN, store, tmp_path), keep_on=False)
    assert "running" in capsys.readouterr().out
    assert sorted(store.root.rglob("*")) == files, "who looks leaves nothing"
