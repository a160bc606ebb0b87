"""Reports about waiting jobs: which jobs are named, when, and which are given up."""

import pytest
from hfprune_launch.slurm.job_info import NEVER, JobInfo
from hfprune_launch.slurm.pending_jobs import LONG_WAIT_S, REMIND_S, STUCK_S, PendingJobs


def waiting(reason, job_id="7", state="PENDING"):
    return JobInfo(job_id, state, reason, "", "", "", "a-job")


class Watched:
    """Pending jobs with a clock that is set by hand, and the messages about them."""

    def __init__(self):
        self.told, self.now = [], 1000.0
        self.jobs = PendingJobs(self.told.append, lambda: self.now)

    def note_at(self, seconds, *jobs):
        """Return the messages about these jobs at so many seconds after the beginning."""
        self.now, before = 1000.0 + seconds, len(self.told)
        self.jobs.note(jobs)
        return self.told[before:]

    def hopeless_at(self, seconds, reason, state="PENDING"):
        self.now = 1000.0 + seconds
        return self.jobs.hopeless(waiting(reason, state=state))


def test_three_jobs_are_named_and_a_fourth_is_not():
    four = [waiting("PartitionDown", str(it)) for it in range(4)]
    assert Watched().note_at(0, *four[:3]) == ["3 jobs can't start: PartitionDown (0, 1, 2)"]
    assert Watched().note_at(0, *four) == ["4 jobs can't start: PartitionDown (0, 1, 2, ...)"]


def test_an_ordinary_reason_is_told_once_it_has_lasted_and_again_after_an_hour():
    watched, job = Watched(), waiting("Priority")
    told_at = [it for it in (0, LONG_WAIT_S - 1, LONG_WAIT_S, LONG_WAIT_S + 1) if watched.note_at(it, job)]
    assert told_at == [LONG_WAIT_S]
    assert watched.told == ["1 job can't start for 5 min: Priority (7)"]
    assert not watched.note_at(LONG_WAIT_S + REMIND_S - 1, job) and watched.note_at(LONG_WAIT_S + REMIND_S, job)


def test_a_wait_that_was_over_in_between_begins_anew():
    watched = Watched()
    watched.note_at(0, waiting("Resources"))
    watched.note_at(200, waiting("None", state="RUNNING"))
    assert not watched.note_at(400, waiting("Resources")) and not watched.note_at(699, waiting("Resources"))
    assert watched.note_at(700, waiting("Resources"))


@pytest.mark.parametrize("job", [waiting("Dependency"), waiting("PartitionDown", state="RUNNING")])
def test_jobs_that_wait_for_others_or_run_are_not_told_of(job):
    assert Watched().note_at(10 * REMIND_S, job) == []


def test_a_dependency_is_given_up_when_slurm_has_had_time_to_end_the_job():
    watched = Watched()
    given_up = [watched.hopeless_at(it, NEVER) for it in (0, STUCK_S - 1, STUCK_S)]
    assert given_up == [None, None, "not run"]


def test_a_dependency_that_became_possible_again_is_waited_for_anew():
    watched = Watched()
    given_up = [watched.hopeless_at(*it) for it in ((0, NEVER), (50, "Dependency"), (100, NEVER), (160, NEVER))]
    assert given_up == [None, None, None, "not run"]


def test_a_job_that_runs_is_not_given_up():
    assert Watched().hopeless_at(0, "launch failure limit exceeded requeued held", state="RUNNING") is None
    assert Watched().hopeless_at(0, "launch failure limit exceeded requeued held") == "bad node"
