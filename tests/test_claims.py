import json
import os
import subprocess
import sys
from dataclasses import asdict

from hfprune_dist import claims
from hfprune_dist.claims import Claim, Holder, try_claim


def test_a_second_claim_meets_the_holder(tmp_path):
    assert isinstance(try_claim(tmp_path), Claim)
    assert try_claim(tmp_path) == Holder.me()


def test_a_released_claim_can_be_taken_again(tmp_path):
    claim = try_claim(tmp_path)
    claim.release()
    assert isinstance(try_claim(tmp_path), Claim)
    assert sorted(file.name for file in tmp_path.glob("claim.*")) == ["claim.1", "claim.2"]


def test_a_dead_holder_is_succeeded(tmp_path):
    script = f"from hfprune_dist.claims import try_claim; from pathlib import Path; try_claim(Path({str(tmp_path)!r}))"
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
    """A stage that finishes discards its work folder, at any moment of another's claim."""
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
        "import sys, time; from pathlib import Path; from hfprune_dist.claims import Claim, try_claim\n"
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
