"""The part of the Hugging Face hub's HTTP interface that tickets take, served on this machine.

Repositories; commits of small files inside the request and of large ones by git-lfs; downloads. There is one
branch and one token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a_token_of_this_test"
Files = dict[str, bytes]


class Hub:
    """What the server holds.

    Attributes:
        url: Where it listens.
        repositories: Id to the files of each commit, the oldest first.
        private: Ids of those that ask for a token.
        requests: Method and path of every request so far.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, list[Files]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}

    def files(self, repo: str) -> Files:
        """Those of the newest commit."""
        return self.repositories[repo][-1]

    def commit_of(self, repo: str) -> str:
        """An id as git gives them."""
        return hashlib.sha1(f"{repo}{len(self.repositories[repo])}".encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port, for the time of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "Invalid username or password.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+?)/preupload/main", path):
            self._preupload(match[1], json.loads(body))
        elif match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+?)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, path)

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_HEAD(self) -> None:
        self._download(body=False)

    def do_GET(self) -> None:
        if match := re.fullmatch(r"/api/models/(.+?)/revision/main\?expand=xetEnabled", self.path):
            self._describe(match[1])  # clients before 1.0 ask how large files are taken
        else:
            self._download(body=True)

    # ---------------------------------------------------------------- what is asked for

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.hub.repositories:
            self._answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
            return
        self.hub.repositories[repo] = [{}]
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        self._answer({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def _describe(self, repo: str) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self._answer({"id": repo, "sha": self.hub.commit_of(repo), "xetEnabled": False})

    def _preupload(self, repo: str, asked: dict[str, Any]) -> None:
        if repo not in self.hub.repositories:
            self._refuse(404, "Repository not found", "RepoNotFound")
            return
        self._answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in asked["files"]
                ]
            }
        )

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.files(repo))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
        self.hub.repositories[repo].append(files)
        commit = self.hub.commit_of(repo)
        self._answer({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def _download(self, *, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        match = re.fullmatch(r"/(.+?)/resolve/(.+?)/([^?]+)(\?.*)?", self.path)
        repo, revision, name = match.group(1, 2, 3) if match else ("", "", "")
        known = repo in self.hub.repositories
        allowed = repo not in self.hub.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not (known and allowed):
            self._refuse(404 if allowed else 401, "Repository not found", "RepoNotFound")
        elif revision not in ("main", self.hub.commit_of(repo)):
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        elif name not in self.hub.files(repo):
            self._refuse(404, "Entry not found", "EntryNotFound", repo)
        else:
            content = self.hub.files(repo)[name]
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": self.hub.commit_of(repo),
            }
            self._send(200, content, headers, body=body)

    # ---------------------------------------------------------------- the wire

    def _body(self) -> bytes:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, message: str, code: str | None = None, repo: str | None = None) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        if code is not None:
            headers["X-Error-Code"] = code
        if repo is not None:
            headers["X-Repo-Commit"] = self.hub.commit_of(repo)
        self._send(status, json.dumps({"error": message}).encode(), headers, body=self.command != "HEAD")

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
