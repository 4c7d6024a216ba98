"""Enough of the Hugging Face hub for its own clients to download and upload, on this machine.

A repository is a folder for each of its revisions. Point a client in a process of its own here
with ``Hub.env``: the hub's address is read once, when its library is imported.
"""

import base64
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.*))?")
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Revision:
    """A repository's files by their paths, and a name made of what they hold."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, listed = files, [[path, _etag(data)] for path, data in files.items()]
        self.commit = hashlib.sha1(json.dumps(listed).encode()).hexdigest()


@functools.cache
def of_folder(folder: Path) -> Revision:
    """A folder's content, read once."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return Revision({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})


@dataclass
class Hub:
    """Repositories, and what goes wrong with them."""

    url: str
    held: dict[tuple[str, str], dict[str, Revision]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # their paths, with the range of a file
    cut: dict[str, int] = field(default_factory=dict)  # repository/file -> downloads cut in half
    gated: set[str] = field(default_factory=set)  # repositories that need a token
    private: set[str] = field(default_factory=set)  # that were made private
    full: set[str] = field(default_factory=set)  # that take no files

    def add(self, kind: str, name: str, folder: Path, revision: str = "main") -> None:
        """Publish a folder as a revision of a repository."""
        self.held.setdefault((kind, name), {})[revision] = of_folder(folder)

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a client that keeps its caches in ``home``."""
        ours = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
        ours |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**ours, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub without repositories."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.hub
        finally:
            server.shutdown()


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """A file, or facts of a repository; revisions in a path have their slashes quoted."""
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".rstrip())
        file, about = FILE.fullmatch(path), API.fullmatch(path)
        if not file and not about:
            self._error(404, "RepoNotFound")
            return
        kind, name, *rest = (file or about).groups()
        revision = rest[0] if file else (rest[1] or "main").partition("/")[0]
        revisions = hub.held.get((kind or "models", name), {})
        known = (one for r, one in revisions.items() if unquote(revision) in (r, one.commit))
        if name in hub.gated:
            self._error(401, "GatedRepo")
        elif not (found := next(known, None)):
            self._error(404, "RevisionNotFound" if revisions else "RepoNotFound")
        elif file:
            self._file(name, found, unquote(rest[1]))
        else:
            self._about(name, found, *rest)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines, match = [json.loads(line) for line in body.splitlines()], UPLOAD.fullmatch(path)
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            if ("models", name) in hub.held:
                self._error(409, "RepoExists")
                return
            hub.held["models", name] = {"main": Revision({".gitattributes": b""})}
            if lines[0].get("private") or lines[0].get("visibility") == "private":
                hub.private.add(name)
            self._json({"url": f"{hub.url}/{name}"})
        elif not match:
            self._error(404, "RepoNotFound")
        elif match[2] == "preupload":
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": file["path"], **mode} for file in lines[0]["files"]]})
        elif match[1] in hub.full:
            self._error(403, "NoRoom")
        else:
            added = [line["value"] for line in lines if line["key"] == "file"]
            added = {file["path"]: base64.b64decode(file["content"]) for file in added}
            revisions = hub.held["models", match[1]]
            revisions["main"] = Revision(revisions["main"].files | added)
            url = f"{hub.url}/{match[1]}/commit/main"
            self._json({"success": True, "commitUrl": url, "commitOid": "0" * 40})

    def _about(self, name: str, found: Revision, what: str | None, rest: str | None) -> None:
        if what != "tree":
            siblings = [{"rfilename": path} for path in found.files]
            self._json({"id": name, "sha": found.commit, "siblings": siblings})
            return
        inside = unquote(rest.partition("/")[2]).strip("/")
        parents = {str(parent) for path in found.files for parent in Path(path).parents} - {"."}
        listed = [{"type": "directory", "path": path, "oid": ""} for path in parents]
        listed += [{"type": "file", "path": path, "oid": _etag(content), "size": len(content)}
                   for path, content in found.files.items()]  # fmt: skip
        below = [each for each in listed if each["path"].startswith(inside)]
        self._json(below) if below else self._error(404, "EntryNotFound")

    def _file(self, name: str, found: Revision, path: str) -> None:
        """A file or, where a range is given, the end of it; half where it is to be cut."""
        content, sha = found.files.get(path), found.commit
        if content is None:
            self._error(404, "EntryNotFound", sha)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-"))[1])
        rest, headers = content[start:], {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": sha}
        headers |= {"Content-Length": str(len(rest))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cuts = self.server.hub.cut
        if self.command == "GET" and cuts.get(f"{name}/{path}"):
            cuts[f"{name}/{path}"] -= 1
            rest = rest[: len(rest) // 2]
        self._reply(206 if start else 200, rest, headers)

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, sha: str = "") -> None:
        self._reply(status, b"", {"X-Error-Code": code, "X-Repo-Commit": sha})

    def _reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
