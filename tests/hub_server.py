"""A small server with what huggingface_hub asks of the Hub: files of repositories, uploads and commits; and its faults.

It follows huggingface_hub's own client: addresses, headers and error codes are those that it reads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

GOOD_TOKEN = "hf_good"


@dataclass
class Repo:
    """Commits by their hash, each the files by name; and branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files on top of a branch; return the hash."""
        before = self.refs.get(branch)
        whole = (self.commits[before] if before else {}) | files
        said = json.dumps([before, {name: hashlib.sha1(data).hexdigest() for name, data in sorted(whole.items())}])
        found = hashlib.sha1(said.encode()).hexdigest()
        self.commits[found], self.refs[branch] = whole, found
        return found

    def resolve(self, revision: str) -> str | None:
        """Return the hash of a branch or of a hash."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The state that tests set, and what was asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.uploaded: dict[str, bytes] = {}  # large files, by SHA-256
        self.log: list[tuple[str, str, str | None]] = []  # method, path, and the Range that was asked for
        self.drops: dict[str, int] = {}  # how many more times the connection breaks off in the middle of a file
        self.failing: int | None = None  # a status that everything gets

    def files(self, method: str = "GET") -> list[str]:
        """Return the names of the files that were asked for, in their order."""
        return [path.split("/resolve/")[1].partition("/")[2] for how, path, _ in self.log if how == method and "/resolve/" in path]  # fmt: skip

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> str:
        """Make a repository; return its commit."""
        self.repos[name] = Repo(**options)
        return self.repos[name].commit(files)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.failing is not None:
            return self._json({}, self.hub.failing)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token != GOOD_TOKEN:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        parts = [unquote(part) for part in url.path.strip("/").split("/")]  # a branch may have a slash
        if parts[0] == "lfs":
            self.hub.uploaded[parts[1]] = body
            return self._json({})
        if parts[:2] == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if not token and self.command in ("POST", "PUT"):
            return self._refuse(401, "", "Invalid username or password.")
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        api = parts[0] == "api"
        name = "/".join(parts[2:4] if api else parts[:2]).removesuffix(".git")
        rest = parts[4:] if api else parts[2:]
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not token):
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        return self._of_repo(name, repo, rest, body)

    def _of_repo(self, name: str, repo: Repo, rest: list[str], body: bytes) -> None:
        if rest[:1] == ["resolve"]:
            return self._resolve(repo, rest[1:])
        if rest[:1] == ["info"]:
            return self._batch(json.loads(body))
        if rest[:1] == ["branch"]:
            repo.refs.setdefault("/".join(rest[1:]), repo.refs["main"])
            return self._json({})
        if rest[:1] == ["preupload"]:
            modes = [
                {"path": each["path"], "uploadMode": "lfs" if ".onnx" in each["path"] else "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            return self._json({"files": modes})
        if rest[:1] == ["commit"]:
            return self._commit(name, repo, rest[1], body)
        commit = repo.resolve(rest[1] if rest[:1] == ["revision"] else "main")
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        siblings = [{"rfilename": file, "size": len(data)} for file, data in repo.commits[commit].items()]
        return self._json({"id": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.onnx filter=lfs\n"}, private=private)
        return self._json({"url": f"{self.hub.url}/{name}"})

    def _resolve(self, repo: Repo, rest: list[str]) -> None:
        commit = repo.resolve(rest[0])
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
        if repo.gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        name = "/".join(rest[1:])
        data = repo.commits[commit].get(name)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit)
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.hub.drops.get(name, 0) > 0:
            self.hub.drops[name] -= 1
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        self.wfile.write(data[start:])
        return None

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {"oid": each["oid"], "size": each["size"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            for each in asked["objects"]
        ]  # fmt: skip
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        files = {}
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repo.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
        commit = repo.commit(files, branch)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _refuse(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._json({"error": message}, status, headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a Hub without repositories at a port of this machine."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub = handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(30)


def variables(hub: Hub, home: Path, **changes: str) -> dict[str, str]:
    """Return the environment of a client of the server, whatever this one has for the Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "PYTHONUTF8": "1"}
    return kept | own | {"COLUMNS": "100"} | changes
