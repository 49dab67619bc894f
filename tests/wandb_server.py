"""A W&B server as far as the client needs one: it keeps the rows of each run, and can misbehave."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Listens on a free port of this machine until it is closed."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.fault = ""  # hang, refuse, slow, or a status such as 401
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}  # run id -> number -> row
        self.started: set[str] = set()  # run ids
        self.ended = threading.Event()
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def break_down(self, fault: str) -> None:
        """Misbehave from now on; `refuse` is a server whose process has died."""
        self.fault = fault
        if fault == "refuse":
            self.shutdown()
            self.server_close()

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """The rows of a run in their order, without the client's own keys."""
        lines = self.lines.get(run_id, {})
        assert sorted(lines) == list(range(len(lines)))
        return [
            {key: value for key, value in lines[number].items() if not key.startswith("_")}
            for number in sorted(lines)
        ]

    def close(self) -> None:
        self.ended.set()
        if self.fault != "refuse":
            self.shutdown()
            self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client that was killed or has hung up."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        fault, status = self.server.fault, 200
        if fault == "refuse":
            self.close_connection = True
            return
        if fault in ("hang", "slow"):
            self.server.ended.wait(3600 if fault == "hang" else 2)
        elif fault:
            status = int(fault)
        answer: dict[str, Any] = {}
        if status == 200 and self.path == "/graphql":
            answer = {"data": self.query(**json.loads(body))}
        elif status == 200 and self.path.endswith("/file_stream"):
            self.keep(json.loads(body))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def query(self, query: str, variables: dict[str, Any], **_: Any) -> dict[str, Any]:
        if "upsertBucket" in query:
            project = {"id": "p", "name": "lorabench", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "project": project, "config": "{}"}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            address = self.server.address
            files = [{"name": n, "uploadUrl": f"{address}/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            viewer = {"id": "u", "username": "me", "entity": "me", "flags": "{}"}
            return {"viewer": viewer | {"teams": {"edges": []}}}
        return {}

    def keep(self, sent: dict[str, Any]) -> None:
        run_id = self.path.split("/")[-2]
        self.server.started.add(run_id)
        history = sent.get("files", {}).get("wandb-history.jsonl")
        if history:
            kept = self.server.lines.setdefault(run_id, {})
            for number, line in enumerate(history["content"], history["offset"]):
                kept[number] = json.loads(line)
