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
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

KIND = {"api/models/": "models", "api/datasets/": "datasets", "datasets/": "datasets", "": "models"}
API = re.compile(
    r"/(api/models/|api/datasets/)([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)/?(.*))?"
)
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
FILE = re.compile(r"/(datasets/|)([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """Repositories, and what goes wrong with them.

    Attributes:
        folders: (kind, name) -> revision -> folder, the first revision being main.
        gated: names of repositories that need a token.
        cut: repository/file -> how many of its next downloads are cut in the middle.
        requests: their paths, with the range of a file where there is one.
        private: names of repositories that were made private.
        full: names of repositories that take no files.
    """

    def __init__(self) -> None:
        self.folders: dict[tuple[str, str], dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.requests: list[str] = []
        self.url, self.private, self.full = "", set(), set()
        self.uploaded = tempfile.TemporaryDirectory()

    def commit(self, name: str, content: dict[str, bytes]) -> None:
        """Publish a model's files, in a folder of their own, as all of a revision is one."""
        folder = Path(tempfile.mkdtemp(dir=self.uploaded.name))
        for path, data in content.items():
            (folder / path).write_bytes(data)
        self.add("models", name, folder)

    def add(self, kind: str, name: str, folder: Path, revision: str = "main") -> None:
        """Publish a folder as a revision of a repository."""
        self.folders.setdefault((kind, name), {})[revision] = folder

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a client that keeps its caches in ``home``."""
        ours = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
        ours |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**ours, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}

    def find(self, kind: str, name: str, revision: str) -> tuple[Path, str] | None:
        """The folder of a revision, which may be a commit, and its commit."""
        for known, folder in self.folders.get((kind, name), {}).items():
            if unquote(revision) in (known, commit(folder)):
                return folder, commit(folder)
        return None


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub, hub.url = hub, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@functools.cache
def files(folder: Path) -> dict[str, bytes]:
    """A repository's files by their paths."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@functools.cache
def commit(folder: Path) -> str:
    """A commit's name, made of what it holds."""
    listed = [[name, _etag(content)] for name, content in files(folder).items()]
    return hashlib.sha1(json.dumps(listed).encode()).hexdigest()


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".rstrip())
        if match := API.fullmatch(path):
            self._api(*match.groups())
        elif match := FILE.fullmatch(path):
            self._file(*match.groups())
        else:
            self._error(404, "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        match = UPLOAD.fullmatch(path)
        if not match and path not in ("/api/repos/create", "/api/validate-yaml"):
            self.do_GET()
            return
        self.hub.requests.append(f"POST {path}")
        lines = [json.loads(line) for line in self._body().splitlines()]
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not match:
            self._create(lines[0])
        elif match[2] == "preupload":
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": file["path"], **mode} for file in lines[0]["files"]]})
        elif match[1] in self.hub.full:
            self._error(403, "NoRoom")
        else:
            held = dict(files(self.hub.folders["models", match[1]]["main"]))
            added = [line["value"] for line in lines if line["key"] == "file"]
            held |= {file["path"]: base64.b64decode(file["content"]) for file in added}
            self.hub.commit(match[1], held)
            url = f"{self.hub.url}/{match[1]}/commit/main"
            self._json({"success": True, "commitUrl": url, "commitOid": "0" * 40})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        if ("models", name) in self.hub.folders:
            self._error(409, "RepoExists")
            return
        self.hub.commit(name, {".gitattributes": b""})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        self._json({"url": f"{self.hub.url}/{name}"})

    def _api(self, kind: str, name: str, what: str | None, rest: str | None) -> None:
        """Facts of a repository; revisions in a path have their slashes quoted."""
        revision, _, below = (rest or "main").partition("/")
        if not (found := self._repository(kind, name, revision)):
            return
        held = files(found[0])
        if what == "refs":
            refs = self.hub.folders[KIND[kind], name]
            heads = [{"name": r, "ref": r, "targetCommit": commit(f)} for r, f in refs.items()]
            self._json({"branches": heads, "converts": [], "tags": []})
        elif what == "paths-info":
            wanted = json.loads(self._body())["paths"]
            self._json([item for item in listing(held) if item["path"] in wanted])
        elif what == "tree":
            prefix = unquote(below).strip("/")
            below = [i for i in listing(held) if i["path"].startswith(f"{prefix}/") or not prefix]
            self._json(below) if below else self._error(404, "EntryNotFound")
        else:
            about = {"id": name, "sha": found[1], "private": False, "gated": False, "tags": []}
            about["siblings"] = [{"rfilename": file} for file in held]
            self._json({**about, "lastModified": "2025-01-01T00:00:00.000Z", "downloads": 0})

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        """A file or, where a range is given, the end of it."""
        if not (found := self._repository(kind, name, revision)):
            return
        content = files(found[0]).get(unquote(path))
        if content is None:
            self._error(404, "EntryNotFound", found[1])
            return
        start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-"))[1])
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": found[1]}
        headers |= {"Accept-Ranges": "bytes", "Content-Length": str(len(content) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(206 if start else 200, headers)
        if self.command == "GET":
            self._send(f"{name}/{path}", content[start:])

    def _send(self, name: str, content: bytes) -> None:
        """All of it, or half of it where the connection is to be cut."""
        cuts = self.hub.cut.get(name, 0)
        self.hub.cut[name] = max(cuts - 1, 0)
        self.wfile.write(content[: len(content) // 2] if cuts else content)

    def _repository(self, kind: str, name: str, revision: str) -> tuple[Path, str] | None:
        found = self.hub.find(KIND[kind], name, revision)
        if name in self.hub.gated:
            self._error(401, "GatedRepo")
        elif not found:
            known = (KIND[kind], name) in self.hub.folders
            self._error(404, "RevisionNotFound" if known else "RepoNotFound")
        else:
            return found
        return None

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        length = str(len(content))
        self._head(200, {"Content-Type": "application/json", "Content-Length": length})
        self.wfile.write(content)

    def _error(self, status: int, code: str, sha: str = "") -> None:
        self._head(status, {"X-Error-Code": code, "X-Repo-Commit": sha, "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def listing(held: dict[str, bytes]) -> list[dict[str, Any]]:
    """Files and folders as the hub lists them."""
    parents = {str(p) for name in held for p in Path(name).parents} - {"."}
    folders = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in parents]
    return folders + [
        {"type": "file", "path": name, "oid": _etag(content), "size": len(content)}
        for name, content in held.items()
    ]
