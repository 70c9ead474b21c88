"""A server of this machine that speaks as much of the Hub's language as its client needs for downloads and commits.

The client is the real one: it is told by HF_ENDPOINT where the Hub is.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name -> branch -> path -> bytes. `got` has method and path of what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.private: dict[str, bool] = {}
        self.got: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sha(self, repo: str, branch: str) -> str:
        """The number of a branch's commit: of all that is in it."""
        files = self.repos[repo][branch]
        return hashlib.sha1(b"".join(n.encode() + files[n] for n in sorted(files))).hexdigest()

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch or commit."""
        for branch in self.repos[repo]:
            if revision in (branch, self.sha(repo, branch)):
                return self.sha(repo, branch), self.repos[repo][branch]
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: Any = b"", **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files, or an error as the Hub has it."""
        if repo not in self.server.repos:
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif repo in self.server.gated and "Authorization" not in self.headers:
            self.reply(401, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        elif (one := self.server.files(repo, revision)) is None:
            self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        else:
            return one
        return None

    def do_GET(self) -> None:
        self.server.got.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, kind, revision = asked.groups()
            if one := self.found(repo, revision or "main"):
                sha, files = one
                tree = [
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in files.items()
                ]
                info = {
                    "id": repo,
                    "modelId": repo,
                    "sha": sha,
                    "siblings": [{"rfilename": n} for n in files],
                }
                self.reply(
                    200, tree if kind == "tree" else {**info, "private": False, "tags": [], "downloads": 0}
                )
        elif asked := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = asked.groups()
            if one := self.found(repo, revision):
                sha, files = one
                if name in files:
                    tag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                    self.reply(200, files[name], ETag=tag, X_Repo_Commit=sha)
                else:
                    self.reply(
                        404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha
                    )
        else:
            self.reply(404, {"error": f"This server does not know {path}"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.got.append(f"POST {self.path}")
        raw = (
            self.rfile.read(int(self.headers["Content-Length"]))
            if "Content-Length" in self.headers
            else self.chunks()
        )
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            asked = json.loads(raw)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            new = repo not in self.server.repos
            if new:
                self.server.repos[repo], self.server.private[repo] = (
                    {"main": {}},
                    asked.get("visibility") == "private",
                )
            self.reply(200 if new else 409, {"url": f"{self.server.address}/{repo}", "id": repo})
        elif path == "/api/validate-yaml":  # of the page's fields
            self.reply(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(raw)["files"]
            ]
            self.reply(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            repo, branch = found.groups()
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    self.server.repos[repo][branch][line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
            sha = self.server.sha(repo, branch)
            url = f"{self.server.address}/{repo}/commit/{sha}"
            self.reply(200, {"commitUrl": url, "commitOid": sha, "success": True})
        else:
            self.reply(404, {"error": f"This server does not know {path}"})

    def chunks(self) -> bytes:
        """A body that is sent piece by piece."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """The server while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
