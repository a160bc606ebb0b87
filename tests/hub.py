"""A Hugging Face hub on this machine, with as much of its interface as looking up a model takes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
