import getpass
import os
import time

from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.whereabouts import Whereabouts

from hfprune_dist.store.artifacts import Store


def test_a_user_without_a_name_is_known_by_number(tmp_path, monkeypatch):
    """This happens in a container that runs as a user of its host."""

    def nameless():
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nameless)
    monkeypatch.setenv("SLURM_CLUSTERS", "a-cluster")
    me = Whereabouts(Store(tmp_path), SlurmCommands(), time.monotonic).me
    assert me == {"cluster": "a-cluster", "user": str(os.getuid())}
