"""Dry runs of models of the hub that aren't in its cache: planned with what the hub tells, or as unknown."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hfprune_launch import sweep
from ranks import ROOT
from sweeps import in_process
from tiny import save_tiny

PAPER = ROOT / "configs" / "sweeps" / "paper.yaml"
COMMIT = "5" * 40


@contextmanager
def local_hub(repositories: Path) -> Iterator[str]:
    """Serve the models in the folder ``<repositories>/<org>/<name>`` on a free port, and yield the address."""

    class Handler(SimpleHTTPRequestHandler):
        def send_head(self) -> object:
            path = self.path.partition("?")[0]
            if found := re.match(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?$", path):
                if not (repositories / found[1]).is_dir():
                    return self._refuse("RepoNotFound")
                self._answer(json.dumps({"id": found[1], "sha": COMMIT, "siblings": []}).encode())
            elif found := re.match(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)$", path):
                file = repositories / found[1] / found[2]
                if not file.is_file():
                    return self._refuse("EntryNotFound")
                begin, end = re.findall(r"\d+", self.headers.get("Range", "bytes=0-999999999"))
                self._answer(file.read_bytes()[int(begin) : int(end) + 1])
            return None

        def _answer(self, content: bytes) -> None:
            self.send_response(200)
            for name, value in {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hash(content):x}"',
                "Content-Length": len(content),
            }.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def dry_run(folder, *arguments, **environment):
    """Run in a process of its own, as the hub's client reads the environment when it is imported."""
    command = [sys.executable, ROOT / "launch" / "sweep.py", "--dry-run", "--out", folder / "out", *arguments]
    own = {"HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "TMPDIR": str(folder), "HF_HUB_OFFLINE": "0"}
    usual = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env={**usual, **own, **environment}
    )


def test_what_can_not_be_looked_up_is_planned_without_its_shape(tmp_path):
    shown = dry_run(tmp_path, "--config", PAPER, "--profile", "example-gpu", HF_HUB_OFFLINE="1")
    assert shown.returncode == 0, shown.stderr
    cells, stages, jobs = 24, 68, shown.stdout.count("#SBATCH --job-name")
    assert f"{cells} cells, {stages} stages: 0 reuse, {stages} run" in shown.stdout
    assert f"{stages} stages in {jobs} jobs" in shown.stdout and jobs < stages
    assert shown.stdout.count("unknown until the model is downloaded") == cells
    assert "width" in shown.stdout and "14336" not in shown.stdout
    assert not list(tmp_path.glob("*")), "nothing is left"


def test_what_the_hub_tells_of_a_model_is_planned_with(tmp_path):
    model = tmp_path / "hub" / "org" / "model"
    save_tiny(model, "llama", shard_size="40KB")
    settings = ["--ratios", "0.2", "--set", "evaluation.tasks=[]", "--set", "recovery.method=none"]
    _, local, _ = in_process(sweep.main, "--dry-run", "--out", tmp_path / "out", "--models", model, *settings)
    with local_hub(tmp_path / "hub") as endpoint:
        shown = dry_run(tmp_path, *settings, "--models", "org/model", HF_ENDPOINT=endpoint)
        again = dry_run(tmp_path, *settings, "--models", f"org/model@{COMMIT}", HF_ENDPOINT=endpoint)
        unknown = dry_run(tmp_path, *settings, "--models", "org/modell", HF_ENDPOINT=endpoint)
    assert shown.returncode == again.returncode == 0, shown.stderr + again.stderr
    assert "it is downloaded when the sweep runs" in shown.stdout

    def shapes(text):
        return text.partition("checkpoint of")[2].partition("\nnote:")[0]

    assert shapes(shown.stdout) == shapes(local) != ""
    cached = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert cached <= {"config.json", "model.safetensors.index.json"}
    assert unknown.returncode == 2 and "org/modell@main can't be downloaded" in unknown.stderr
    assert Path(tmp_path / "out").exists() is False
