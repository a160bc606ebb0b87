"""A Hugging Face hub on this machine, with as much of its interface as pushing a folder takes."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER, TOKEN = "me", "hf_token_of_me"
# As on the real hub, which decides by a file's name and size.
LARGE = re.compile(r"\.(safetensors|bin)$")


@dataclass
class Repository:
    """A model: its visibility, its files, and the messages of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The state of a hub.

    Attributes:
        broken: pattern of the paths of requests that it answers with an internal error.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    broken: str = "^$"

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return status and content of an answer to an authorized request."""
        if re.search(self.broken, path):
            return 400, {"error": "broken on purpose"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.match(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit)/main)?$", path):
            return self._of_repository(found[1], found[2], body)
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"objects": [self._place_of(it) for it in json.loads(body)["objects"]]}
        if path.startswith("/objects/"):
            self.objects[path.split("/")[-1]] = body
            return 200, {}
        return 404, {"error": f"{path} not found"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        owner = asked.get("organization") or USER
        if owner != USER:
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner!r}"}
        repo_id = f"{owner}/{asked['name']}"
        is_new = repo_id not in self.repositories
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories.setdefault(repo_id, Repository(private))
        return 200 if is_new else 409, {"url": f"{self.endpoint}/{repo_id}", "error": "" if is_new else "exists"}

    def _of_repository(self, repo_id: str, asked: str | None, body: bytes) -> tuple[int, dict[str, Any]]:
        if repo_id not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[repo_id]
        if asked == "preupload":
            names = [it["path"] for it in json.loads(body)["files"]]
            modes = ["lfs" if LARGE.search(name) else "regular" for name in names]
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes, strict=True)
            ]
            return 200, {"files": files}
        if asked == "commit":
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
            oid = f"{len(repository.commits):040x}"
            return 200, {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid}
        return 200, {"id": repo_id, "private": repository.private, "sha": "0" * 40, "siblings": []}

    def _commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]

    def _place_of(self, upload: dict[str, Any]) -> dict[str, Any]:
        return {**upload, "actions": {"upload": {"href": f"{self.endpoint}/objects/{upload['oid']}"}}}


@contextmanager
def local_hub() -> Iterator[Hub]:
    """Serve a hub without repositories on a free port; it knows one user, whose token requests must carry."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._serve()

        do_GET = do_PUT = do_POST

        def _serve(self) -> None:
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/objects/")
            status, content = hub.answer(path, body) if is_known else (401, {"error": "Invalid username or password."})
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
