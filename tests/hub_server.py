"""A Hugging Face hub on this machine: as much of its HTTP API as pushing and fetching models takes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens that are known; the second may not write."""

Files = dict[str, bytes]


class HubServer:
    """The server, and what it holds."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, str]] = {}
        """Repository → branch → commit."""
        self.commits: dict[str, Files] = {"0" * 40: {}}
        """Commit → its files by path."""
        self.private: set[str] = set()
        """Repositories that are."""
        self.blobs: Files = {}
        """Contents of large files by their SHA-256."""
        self.requests: list[str] = []
        """Method and path of each request."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str, branch: str = "main") -> Files:
        """What a branch has."""
        return self.commits[self.branches[repository][branch]]

    def put(self, repository: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit files beside those that are there; returns the commit."""
        before = self.branches.setdefault(repository, {"main": "0" * 40})
        after = self.commits[before.get(branch, "0" * 40)] | dict(files)
        facts = [repository, branch, sorted((n, hashlib.sha256(c).hexdigest()) for n, c in after.items())]
        commit = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.commits[commit] = after
        before[branch] = commit
        return commit

    def environment(self, home: Any, token: str | None = WRITER) -> dict[str, str]:
        """Variables with which the hub's client comes here; of a process that has not imported it yet."""
        known = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        return known | ({} if token is None else {"HF_TOKEN": token})


class _Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        self.status, self.code, self.message, self.more = status, code, message, more


class _Handler(BaseHTTPRequestHandler):
    """Answers requests."""

    protocol_version = "HTTP/1.1"
    hub: ClassVar[HubServer]

    def log_message(self, *_: Any) -> None:
        """Nothing: the test's output is no log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        headers: dict[str, str] = {}
        try:
            status, answer, headers = 200, *self._of(path, body)
        except _Refused as error:
            status, answer = error.status, json.dumps({"error": error.message, **error.more}).encode()
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _of(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        """The answer's body and headers."""
        repository = r"([\w.-]+/[\w.-]+)"
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("PUT", r"/lfs/(\w+)", self._upload),
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("POST", rf"/api/models/{repository}/branch/(.+)", self._branch),
            ("POST", rf"/api/models/{repository}/preupload/(.+)", self._preupload),
            ("POST", rf"/api/models/{repository}/commit/(.+)", self._commit),
            ("POST", rf"/{repository}\.git/info/lfs/objects/batch", self._batch),
            ("GET", rf"/api/models/{repository}(?:/revision/(.+))?", self._info),
            ("GET", rf"/api/models/{repository}/tree/([^/]+)", self._tree),
            ("GET", rf"/{repository}/resolve/([^/]+)/(.+)", self._file),
        ]
        for method, pattern, serve in routes:
            same = self.command == method or (self.command, method) == ("HEAD", "GET")
            if same and (match := re.fullmatch(pattern, path)):
                given = [None if part is None else unquote(part) for part in match.groups()]
                answer = serve(*given, body) if method in ("POST", "PUT") else serve(*given)
                return answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        raise _Refused(404, message=f"no route for {self.command} {path}")

    def _token(self) -> str | None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if given not in (None, WRITER, READER):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return given

    def _check_writer(self) -> None:
        if (token := self._token()) != WRITER:
            raise _Refused(403 if token else 401, message="You don't have the rights to write here")

    def _commit_of(self, repository: str, revision: str | None) -> str:
        token = self._token()
        if repository not in self.hub.branches or (repository in self.hub.private and token is None):
            raise _Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        commit = self.hub.branches[repository].get(revision or "main", revision)
        if commit not in self.hub.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return str(commit)

    def _create(self, body: bytes) -> Any:
        self._check_writer()
        given = json.loads(body)
        name = f"{given['organization']}/{given['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.branches:
            raise _Refused(409, message="You already created this model repo", **url)
        self.hub.branches[name] = {"main": "0" * 40}
        if given.get("visibility") == "private":
            self.hub.private.add(name)
        return url

    def _validate(self, body: bytes) -> Any:
        front = json.loads(body)["content"].split("---\n")[1]
        metadata = yaml.safe_load(front)
        for model in metadata.get("model-index", []):
            for result in model["results"]:
                assert {"task", "dataset", "metrics"} <= result.keys()
        return {"errors": [], "warnings": []}

    def _branch(self, repository: str, branch: str, body: bytes) -> Any:
        self._check_writer()
        if branch in self.hub.branches[repository]:
            raise _Refused(409, message="Reference already exists")
        self.hub.branches[repository][branch] = self.hub.branches[repository]["main"]
        return {}

    def _preupload(self, repository: str, revision: str, body: bytes) -> Any:
        self._check_writer()
        self._commit_of(repository, revision)
        names = [file["path"] for file in json.loads(body)["files"]]
        large = (".safetensors", ".png")
        modes = ["lfs" if name.endswith(large) else "regular" for name in names]
        return {
            "files": [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes, strict=True)
            ]
        }

    def _batch(self, repository: str, body: bytes) -> Any:
        self._check_writer()
        return {
            "transfer": "basic",
            "objects": [
                one
                | (
                    {}
                    if one["oid"] in self.hub.blobs
                    else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                )
                for one in json.loads(body)["objects"]
            ],
        }

    def _upload(self, oid: str, body: bytes) -> Any:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        return {}

    def _commit(self, repository: str, revision: str, body: bytes) -> Any:
        self._check_writer()
        self._commit_of(repository, revision)
        files: Files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.put(repository, files, revision)
        return {"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "commitOid": commit}

    def _info(self, repository: str, revision: str | None) -> Any:
        commit = self._commit_of(repository, revision)
        return {"id": repository, "sha": commit, "private": repository in self.hub.private, "siblings": []}

    def _tree(self, repository: str, revision: str) -> Any:
        files = self.hub.commits[self._commit_of(repository, revision)]
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]

    def _file(self, repository: str, revision: str, name: str) -> Any:
        commit = self._commit_of(repository, revision)
        content = self.hub.commits[commit].get(name)
        if content is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        return content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
