"""A stand-in for the Hub on 127.0.0.1: repositories in memory, behind the few endpoints that pushes and loads use.

It answers what huggingface_hub asks, refuses what the real one refuses, and can break off a commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_test"
MAX_BODY = 32 * 2**20  # bytes


@dataclass
class Repo:
    """One model repository: visibility, its files, and the list of its commits' messages."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        """Changes with every commit, as a git commit's name does."""
        return hashlib.sha1(json.dumps(self.commits).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Attributes: `repos` by id; `requests`, all seen as "METHOD path"; `failing_commits`, how many to break off."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.failing_commits = 0

    @property
    def url(self) -> str:
        """Value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo_id: str, folder: Path) -> None:
        """A public repository with a folder's files."""
        self.repos[repo_id] = Repo(False, {file.name: file.read_bytes() for file in folder.iterdir()}, ["seed"])


@contextmanager
def serving():
    """A running Hub; stopped on exit."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(timeout=5)


class Handler(BaseHTTPRequestHandler):
    """Routes: (pattern, method) -> a method of this class that takes the pattern's groups."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: Hub

    def do_GET(self):
        self.route(
            {
                r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?": self.info,
                r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)": self.resolve,
            }
        )

    do_HEAD = do_GET

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        if length > MAX_BODY:
            return self.refuse(413, "too large")
        self.body = self.rfile.read(length)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Invalid credentials in Authorization header")
        self.route(
            {
                r"/api/repos/create": self.create,
                r"/api/validate-yaml": lambda: self.reply({"errors": [], "warnings": []}),
                r"/api/models/([^/]+/[^/]+)/preupload/main": self.preupload,
                r"/api/models/([^/]+/[^/]+)/commit/main": self.commit,
            }
        )

    def route(self, routes) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        for pattern, handle in routes.items():
            if match := re.fullmatch(pattern, path):
                return handle(*match.groups())
        self.refuse(404, "no such endpoint")

    def repo(self, repo_id: str) -> Repo | None:
        """A repository that this request may see; otherwise answers as if there were none."""
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.refuse(404, "Repository not found", code="RepoNotFound")
        return repo

    def info(self, repo_id: str) -> None:
        if repo := self.repo(repo_id):
            siblings = [{"rfilename": name} for name in repo.files]
            self.reply({"id": repo_id, "sha": repo.sha, "private": repo.private, "siblings": siblings})

    def resolve(self, repo_id: str, name: str) -> None:
        if not (repo := self.repo(repo_id)):
            return
        if name not in repo.files:
            return self.refuse(404, "Entry not found", code="EntryNotFound")
        content = repo.files[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": repo.sha}
        self.send(200, content, "application/octet-stream", headers)

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repos:
            return self.reply({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.repos[repo_id] = Repo(private, {".gitattributes": b""}, ["initial commit"])
        self.reply({"url": url})

    def preupload(self, repo_id: str) -> None:
        if self.repo(repo_id):
            files = json.loads(self.body)["files"]
            self.reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})

    def commit(self, repo_id: str) -> None:
        if not (repo := self.repo(repo_id)):
            return
        if self.server.failing_commits > 0:
            self.server.failing_commits -= 1
            self.close_connection = True
            return self.connection.close()
        lines = [json.loads(line) for line in self.body.splitlines()]
        for value in (line["value"] for line in lines if line["key"] == "file"):
            repo.files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
            del repo.files[value["path"]]
        repo.commits.append(lines[0]["value"]["summary"])
        self.reply({"commitUrl": f"{self.server.url}/{repo_id}/commit/{repo.sha}", "commitOid": repo.sha})

    def reply(self, value: dict, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), "application/json")

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def send(self, status: int, body: bytes, content_type: str, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Silent."""
