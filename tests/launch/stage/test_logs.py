"""Logs of any length are read from their end, and may be gone."""

from hfprune_launch.stage.logs import end_of_log


def test_of_a_long_log_only_the_end_is_read(tmp_path):
    (tmp_path / "log").write_bytes("caf\u00e9\nlast".encode())
    assert end_of_log(tmp_path / "log", 6) == "\ufffd\nlast" and end_of_log(tmp_path / "none", 6) == ""
