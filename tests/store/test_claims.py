import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from hfprune_dist.store import claims
from hfprune_dist.store.claims import Claim, ClaimLostError, Holder, OpenClaim, Renewal, open_claim, try_claim


def test_a_second_claim_meets_the_holder(tmp_path):
    assert isinstance(try_claim(tmp_path), Claim)
    assert try_claim(tmp_path) == Holder.me()


def test_a_released_claim_can_be_taken_again(tmp_path):
    claim = try_claim(tmp_path)
    claim.release()
    assert isinstance(try_claim(tmp_path), Claim)
    assert sorted(file.name for file in tmp_path.glob("claim.*")) == ["claim.1", "claim.2"]


def test_a_dead_holder_is_succeeded(tmp_path):
    script = (
        f"from hfprune_dist.store.claims import try_claim; from pathlib import Path; try_claim(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert isinstance(try_claim(tmp_path), Claim)


def test_a_reused_process_id_does_not_count_as_alive(tmp_path):
    impostor = Holder(Holder.me().host, os.getpid(), 1.0)
    (tmp_path / "claim.1").write_text(json.dumps(asdict(impostor)))
    assert isinstance(try_claim(tmp_path), Claim)


def test_a_holder_on_another_host_lives_as_long_as_it_renews(tmp_path):
    file = tmp_path / "claim.1"
    file.write_text(json.dumps(asdict(Holder("another-host", 1, 1.0))))
    assert isinstance(try_claim(tmp_path), Holder)
    os.utime(file, (0, 0))
    assert isinstance(try_claim(tmp_path), Claim)


def test_a_folder_that_its_holder_has_just_removed_is_made_again(tmp_path, monkeypatch):
    """A stage that finishes discards its work folder, at any moment of another process's claim."""
    folder, looked = tmp_path / "work", []
    original = claims._current

    def removed_meanwhile(there):
        found = original(there)
        if not looked:
            there.rmdir()
        looked.append(found)
        return found

    monkeypatch.setattr(claims, "_current", removed_meanwhile)
    assert isinstance(try_claim(folder), Claim)
    assert looked == [(0, None)] * 2 and (folder / "claim.1").is_file()


def test_of_many_claimants_one_wins(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from hfprune_dist.store.claims import Claim, try_claim\n"
        f"print(isinstance(try_claim(Path({str(tmp_path)!r})), Claim), flush=True); sys.stdin.read()"
    )
    claimants = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    verdicts = [claimant.stdout.readline().strip() for claimant in claimants]
    for claimant in claimants:
        claimant.communicate()
    assert sorted(verdicts) == ["False"] * 5 + ["True"]


def test_who_lives_lives_whatever_becomes_of_the_clock(tmp_path, monkeypatch):
    """The Unix time of a process's start changes with every adjustment of the system's clock."""
    assert isinstance(try_claim(tmp_path), Claim)
    monkeypatch.setattr(claims, "_start_time", lambda pid: 1.0)
    monkeypatch.setattr(time, "time", lambda: 1e10)
    assert isinstance(try_claim(tmp_path), Holder)


def test_another_system_of_the_same_name_lives_as_long_as_it_renews(tmp_path):
    """Of machines called localhost, and containers that share a host's name, process ids say nothing."""
    me = Holder.me()
    file = tmp_path / "claim.1"
    file.write_text(json.dumps(asdict(Holder(me.host, 2**22 + 1, f"another-boot/pid:[1]/{4711}"))))
    assert isinstance(try_claim(tmp_path), Holder)
    os.utime(file, (0, 0))
    assert isinstance(try_claim(tmp_path), Claim)


def test_a_requeued_job_succeeds_itself_and_anyone_a_job_that_has_ended(tmp_path):
    assert isinstance(try_claim(tmp_path, "7"), Claim)
    for job, ended in ((None, ()), ("8", ()), ("8", ("9",))):
        assert try_claim(tmp_path, job, ended) == Holder.me("7")
    again = try_claim(tmp_path, "7")
    assert isinstance(again, Claim) and isinstance(try_claim(tmp_path, "8", {"6", "7"}), Claim)
    assert not again.is_held()


def test_a_claim_is_open_until_it_is_released_though_its_holder_may_be_dead(tmp_path):
    assert open_claim(tmp_path / "gone") is open_claim(tmp_path) is None
    claim = try_claim(tmp_path)
    assert open_claim(tmp_path) == OpenClaim(Holder.me(), lives=True)
    claim.release()
    assert open_claim(tmp_path) is None
    dead = Holder(Holder.me().host, os.getpid(), 1.0)
    (tmp_path / "claim.2").write_text(json.dumps(asdict(dead)))
    assert open_claim(tmp_path) == OpenClaim(dead, lives=False)


def test_a_clock_that_is_ahead_declares_nobody_dead(tmp_path, monkeypatch):
    """What counts is the clock that dates the renewals."""
    file = tmp_path / "claim.1"
    file.write_text(json.dumps(asdict(Holder("another-host", 1, 1.0))))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert isinstance(try_claim(tmp_path), Holder)
    assert [path.name for path in tmp_path.iterdir()] == ["claim.1"]


def test_a_clock_that_is_behind_keeps_no_dead_holder_alive(tmp_path, monkeypatch):
    file, now = tmp_path / "claim.1", time.time()
    file.write_text(json.dumps(asdict(Holder("another-host", 1, 1.0))))
    os.utime(file, (now - 400, now - 400))
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    assert isinstance(try_claim(tmp_path), Claim)


@pytest.mark.parametrize("content", ["{", '{"host": 1}'])
def test_a_damaged_claim_holds_nobody_back(tmp_path, content):
    (tmp_path / "claim.1").write_text(content)
    (tmp_path / "claim.x").write_text(content)
    claim = try_claim(tmp_path)
    assert isinstance(claim, Claim) and claim.is_held()


def test_a_claim_that_can_not_be_read_is_not_taken(tmp_path, monkeypatch):
    """On NFS, a file that is replaced while it is open is stale, and readable again afterwards."""
    holder, read = try_claim(tmp_path), Path.read_text
    failing = [OSError(errno.ESTALE, "stale")] * 2

    def stale_at_first(file, **how):
        if failing and file.name == "claim.1":
            raise failing.pop()
        return read(file, **how)

    monkeypatch.setattr(Path, "read_text", stale_at_first)
    assert isinstance(try_claim(tmp_path), Holder) and not failing
    failing += [OSError(errno.EIO, "broken")]
    with pytest.raises(OSError, match="broken"):
        try_claim(tmp_path)
    assert holder.is_held()


def test_a_link_whose_answer_was_lost_is_ours(tmp_path, monkeypatch):
    """NFS repeats the request, and is told that the name exists."""
    link = os.link

    def answered_late(*names):
        link(*names)
        raise FileExistsError

    monkeypatch.setattr(os, "link", answered_late)
    claim = try_claim(tmp_path)
    assert isinstance(claim, Claim) and claim.is_held()
    assert [path.name for path in tmp_path.iterdir()] == ["claim.1"]


def suspended(folder, monkeypatch):
    """Return a claim that another process has taken over, and that process's claim."""
    claim = try_claim(folder)
    with monkeypatch.context() as patch:
        patch.setattr(claims, "_lives", lambda *_: False)
        return claim, try_claim(folder)


def test_who_was_taken_for_dead_notices(tmp_path, monkeypatch):
    lost, successor = suspended(tmp_path, monkeypatch)
    assert not lost.is_held() and successor.is_held()
    with pytest.raises(ClaimLostError, match="another process has taken over"):
        lost.renew()
    lost.release()
    assert successor.is_held(), "what is lost can't be released"
    successor.release()
    assert not successor.is_held()


def test_a_folder_that_was_made_again_is_another(tmp_path):
    """A successor finished the stage and removed the folder; later, a third process claims the same generation."""
    folder = tmp_path / "work"
    lost = try_claim(folder)
    shutil.rmtree(folder)
    assert not lost.is_held()
    third = try_claim(folder)
    assert (folder / "claim.1").is_file() and third.is_held() and not lost.is_held()
    lost.release()
    assert third.is_held()


def test_a_rank_checks_the_claim_of_its_launcher(tmp_path):
    claim = try_claim(tmp_path)
    rank = Claim.from_ticket(tmp_path, claim.ticket)
    assert rank.is_held() and rank.token == claim.token
    claim.release()
    with pytest.raises(ClaimLostError):
        rank.require_held()


def test_renewal_goes_on_after_errors_and_tells_of_long_ones(tmp_path, monkeypatch):
    claim, told, now = try_claim(tmp_path), [], [0.0]
    renewal, utime, renewed = Renewal(claim, told.append, lambda: now[0]), os.utime, []

    def run(seconds):
        end = now[0] + seconds
        while now[0] < end:
            now[0] += 1.0
            renewal.tick()

    monkeypatch.setattr(os, "utime", lambda file: renewed.append(now[0]) or utime(file))
    run(200)
    assert renewed == [60.0, 120.0, 180.0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", lambda file: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale file handle")))
        run(100)
        assert told == [], "one error is nothing"
        run(300)
    assert [message.split(";")[0] for message in told] == [
        "the claim on this stage could not be renewed for 180 s ([Errno 116] Stale file handle)",
        "the claim on this stage could not be renewed for 360 s ([Errno 116] Stale file handle)",
    ]
    run(120)
    assert renewed[3:] == [660.0, 720.0]
