"""A W&B server as far as the client needs one: it keeps what a run sends, and can misbehave."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote


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
        self.runs: dict[str, dict[str, Any]] = {}  # run id -> what it was created with
        self.summaries: dict[str, dict[str, Any]] = {}  # run id -> the last one sent
        self.files: dict[str, bytes] = {}  # path -> content: RUN/NAME, or ARTIFACT/NAME
        self.artifacts: dict[str, dict[str, Any]] = {}  # name -> type, run; committed ones
        self.drafts: dict[str, dict[str, Any]] = {}
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
        elif status == 200 and self.path.startswith("/put/"):
            self.server.files[unquote(self.path.removeprefix("/put/"))] = body
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def query(
        self, query: str, variables: dict[str, Any] | None = None, **_: Any
    ) -> dict[str, Any]:
        variables = variables or {}
        project = {"id": "p", "name": "lorabench", "entity": {"id": "e", "name": "me"}}
        if "upsertBucket" in query:
            name = variables["name"]
            is_new = name not in self.server.runs
            given = {key: value for key, value in variables.items() if value is not None}
            self.server.runs.setdefault(name, {}).update(given)
            bucket = {"id": "b", "name": name, "project": project, "config": "{}"}
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if "RunResumeStatus" in query and variables["name"] in self.server.runs:
            return {"model": project | {"bucket": self.resumed(variables["name"])}}
        if "createRunFiles" in query:
            run = variables["run"]
            files = [{"name": n, "uploadUrl": self.place(run, n)} for n in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "rtifact" in query:
            return self.artifact(query, variables)
        if "viewer" in query:
            viewer = {"id": "u", "username": "me", "entity": "me", "flags": "{}"}
            return {"viewer": viewer | {"teams": {"edges": []}}}
        return {}

    def place(self, folder: str, name: str) -> str:
        """Where the client may put a file."""
        return f"{self.server.address}/put/{quote(f'{folder}/{name}')}"

    def resumed(self, run_id: str) -> dict[str, Any]:
        """What the server tells of a run that it has."""
        lines = self.server.lines.get(run_id, {})
        tail = [json.dumps(lines[max(lines)])] if lines else []
        config = self.server.runs[run_id].get("config", "{}")
        own = json.loads(config).get("_wandb", {"value": {}})["value"]
        started = {"t": own["t"]} if "t" in own else {}  # without it the client takes it for new
        return {
            "id": "b", "name": run_id, "displayName": run_id, "config": config, "tags": [],
            "notes": "", "wandbConfig": json.dumps(started), "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]", "historyLineCount": len(lines), "historyTail": json.dumps(tail),
            "summaryMetrics": json.dumps(self.server.summaries.get(run_id, {})),
        }  # fmt: skip

    def artifact(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        server = self.server
        if "createArtifact(" in query:
            given = variables["input"]
            (name,) = {value for key, value in given.items() if "CollectionName" in key and value}
            name = name if isinstance(name, str) else name[0]
            server.drafts[name] = given
            found = {"id": name, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": found}}
        if "createArtifactManifest(" in query:
            folder, name = variables["artifactID"], variables["name"]
            file = {"id": "f", "uploadUrl": self.place(folder, name), "uploadHeaders": []}
            found = {"id": folder, "file": file}
            return {"createArtifactManifest": {"artifactManifest": found}}
        if "updateArtifactManifest(" in query:
            folder = variables["artifactManifestID"]
            file = {"id": "f", "uploadUrl": self.place(folder, "manifest"), "uploadHeaders": []}
            found = {"id": folder, "file": file}
            return {"updateArtifactManifest": {"artifactManifest": found}}
        if "createArtifactFiles(" in query:
            nodes = [
                {
                    "storagePath": one["name"], "uploadHeaders": [], "uploadMultipartUrls": None,
                    "uploadUrl": self.place(one["artifactID"], one["name"]),
                    "artifact": {"id": one["artifactID"]},
                }
                for one in variables["input"]["artifactFiles"]
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": [{"node": one} for one in nodes]}}}
        if "commitArtifact(" in query:
            name = variables["artifactID"]
            server.artifacts[name] = server.drafts[name]
            return {"commitArtifact": {"artifact": {"id": name, "digest": "0"}}}
        return {"project": None}  # whether there is one of that name

    def keep(self, sent: dict[str, Any]) -> None:
        run_id = self.path.split("/")[-2]
        self.server.started.add(run_id)
        history = sent.get("files", {}).get("wandb-history.jsonl")
        if history:
            kept = self.server.lines.setdefault(run_id, {})
            for number, line in enumerate(history["content"], history["offset"]):
                kept[number] = json.loads(line)
        if summary := sent.get("files", {}).get("wandb-summary.json"):
            self.server.summaries[run_id] = json.loads(summary["content"][-1])
