"""A small Hub on this machine: it serves what the real huggingface_hub client asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_somebody_who_accepted"


@dataclass
class Repo:
    """A repository at one commit, its branch main."""

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    gated: bool = False  # its files are for those who send TOKEN

    @classmethod
    def of(cls, folder: Path, **more: Any) -> Repo:
        names = [path for path in folder.rglob("*") if path.is_file()]
        return cls({str(p.relative_to(folder)): p.read_bytes() for p in names}, **more)


@dataclass
class Hub:
    """Repositories by `models/ORG/NAME` or `datasets/ORG/NAME`, and what was asked of them."""

    repos: dict[str, Repo]
    address: str = ""
    downloaded: list[str] = field(default_factory=list)  # files whose bytes were sent

    def answer(self, method: str, url: str, token: str, body: bytes) -> tuple[int, dict, bytes]:
        """Return status, headers and body."""
        path = unquote(urlsplit(url).path).strip("/")
        is_api = path.startswith("api/")
        parts = path.removeprefix("api/").split("/")
        if parts[0] not in ("models", "datasets"):
            parts.insert(0, "models")
        repo, (verb, *rest) = self.repos.get("/".join(parts[:3])), [*parts[3:], ""]
        if repo is None:
            return self.refusal(401 if not token else 404, "RepoNotFound", "Repository Not Found")
        rest = [part for part in rest if part]
        if rest and rest[0] not in ("main", repo.commit):
            return self.refusal(404, "RevisionNotFound", "Invalid rev id")
        if is_api:
            return self.as_json(self.api(parts[:3], repo, verb, rest[1:], body))
        name = "/".join(rest[1:])
        if repo.gated and token != TOKEN:
            code = 403 if token else 401
            return self.refusal(code, "GatedRepo", f"Access to {parts[1]} is restricted")
        if name not in repo.files:
            return self.refusal(404, "EntryNotFound", "Entry not found", repo.commit)
        content = repo.files[name]
        if method == "GET":
            self.downloaded.append(name)
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit}, content

    @staticmethod
    def api(name: list[str], repo: Repo, verb: str, inside: list[str], body: bytes) -> Any:
        files = [
            {"type": "file", "path": path, "size": len(content),
             "oid": hashlib.sha1(content).hexdigest()}
            for path, content in repo.files.items()
        ]  # fmt: skip
        if verb == "tree":
            folders = {str(up) for path in repo.files for up in PurePosixPath(path).parents} - {"."}
            there = [{"type": "directory", "path": up, "oid": "0"} for up in sorted(folders)]
            top = "/".join(inside)
            return [one for one in files + there if one["path"].startswith(f"{top}/" * bool(top))]
        if verb == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            return [one for one in files if one["path"] in asked]
        return {
            "_id": "0", "id": "/".join(name[1:]), "sha": repo.commit, "private": False,
            "gated": repo.gated and "manual", "disabled": False, "downloads": 0, "likes": 0,
            "tags": [], "siblings": [{"rfilename": path} for path in repo.files],
        }  # fmt: skip

    @staticmethod
    def as_json(content: Any) -> tuple[int, dict, bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    @staticmethod
    def refusal(code: int, kind: str, text: str, commit: str = "") -> tuple[int, dict, bytes]:
        headers = {"X-Error-Code": kind, "X-Error-Message": text}
        return code, headers | ({"X-Repo-Commit": commit} if commit else {}), b""


@contextmanager
def serving(repos: dict[str, Repo]) -> Iterator[Hub]:
    """Serve repositories until the block ends; `address` is what HF_ENDPOINT would be."""
    hub = Hub(repos)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes

        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = hub.answer(self.command, self.path, token, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
