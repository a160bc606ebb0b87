import errno
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import chain, repeat
from pathlib import Path
from unittest import mock

import pytest

from hfprune_dist.store import claims
from hfprune_dist.store.claims import Claim, Holder, holder_of, keep_renewed, try_claim

ELSEWHERE = Holder("another-host", 1, "boot/pid:[1]/1")
# The same name for another machine, or a container that shares it: process ids say nothing.
NAMESAKE = replace(Holder.me(), pid=2**22 + 1, started="another-boot/pid:[1]/4711")
# A process id that was given to another process since, and one that no process has.
REUSED = replace(Holder.me(), started=f"{Holder.me().started.rpartition('/')[0]}/1")
DEAD = replace(Holder.me(), pid=2**22 + 1)


def write(folder, holder):
    file = folder / "claim.1"
    file.write_text(json.dumps(asdict(holder)))
    return file


def test_a_second_claim_meets_the_holder_until_it_is_released(tmp_path):
    claim = try_claim(tmp_path)
    rank = Claim(tmp_path, claim.token)
    assert rank.is_held() and try_claim(tmp_path) == Holder.me()
    claim.release()
    assert not rank.is_held() and isinstance(try_claim(tmp_path), Claim)
    assert sorted(file.name for file in tmp_path.glob("claim.*")) == ["claim.1", "claim.2"]


@pytest.mark.parametrize("dead", [REUSED, DEAD])
def test_a_dead_holder_is_succeeded(tmp_path, dead):
    write(tmp_path, dead)
    assert holder_of(tmp_path) == replace(dead, lives=False)
    claim = try_claim(tmp_path)
    assert isinstance(claim, Claim) and holder_of(tmp_path) == Holder.me()
    claim.release()
    assert holder_of(tmp_path) is holder_of(tmp_path / "gone") is None


@pytest.mark.parametrize("holder", [ELSEWHERE, NAMESAKE])
@pytest.mark.parametrize("ahead", [-3600, 0, 3600])
def test_a_holder_that_can_not_be_seen_lives_as_long_as_it_renews(tmp_path, monkeypatch, holder, ahead):
    """What counts is the clock that dates the renewals."""
    file, now = write(tmp_path, holder), time.time()
    monkeypatch.setattr(time, "time", lambda: now + ahead)
    assert isinstance(try_claim(tmp_path), Holder)
    os.utime(file, (now - 250,) * 2)
    assert isinstance(try_claim(tmp_path), Holder)
    assert [path.name for path in tmp_path.iterdir()] == ["claim.1"]
    os.utime(file, (now - 350,) * 2)
    assert isinstance(try_claim(tmp_path), Claim)


def test_a_process_that_is_hidden_may_live(tmp_path, monkeypatch):
    """/proc may hide processes of other users."""

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    write(tmp_path, DEAD)
    assert isinstance(try_claim(tmp_path), Holder)


def test_a_requeued_job_succeeds_itself(tmp_path):
    first = try_claim(tmp_path, "7")
    assert try_claim(tmp_path) == try_claim(tmp_path, "8") == Holder.me("7")
    again = try_claim(tmp_path, "7")
    assert again.is_held() and not first.is_held()


def test_a_claim_that_can_not_be_read_is_not_taken(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EIO, "broken")

    holder = try_claim(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
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


def test_a_folder_that_was_made_again_is_another(tmp_path):
    """A successor finished the stage and removed the folder; later, a third process claims the same generation."""
    folder = tmp_path / "work"
    lost = try_claim(folder)
    shutil.rmtree(folder)
    third = try_claim(folder)
    lost.release()
    assert (folder / "claim.1").is_file() and third.is_held() and not lost.is_held()


def test_renewal_goes_on_after_errors_until_the_claim_is_released(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_S", 0.01)
    claim, before = try_claim(tmp_path), threading.active_count()
    answers = chain([OSError(errno.EIO, "")], repeat(None))
    with mock.patch.object(os, "utime", side_effect=answers) as renewal:
        keep_renewed(claim)
        assert eventually(lambda: renewal.call_count > 3)
        claim.release()
        assert eventually(lambda: threading.active_count() == before)


def eventually(holds):
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_a_folder_is_locked_by_one_at_a_time_on_any_file_system(tmp_path):
    inside, most = [], []

    def work(_):
        with claims.locked(tmp_path / "lock"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert most == [1] * 12 and len(list((tmp_path / "lock").iterdir())) == 1


def test_a_cancellation_without_content_counts(tmp_path):
    cancellation = claims.Cancellation(tmp_path)
    assert not cancellation.is_requested()
    (tmp_path / "cancelled").touch()
    assert cancellation.is_requested() and not claims.Cancellation(tmp_path).is_requested()
