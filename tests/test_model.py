"""The base: hub failures told in one line by the real client, tokens shared, dropouts off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import composed, say

from lorabench import model as base_model

# A model's name in conf/model, its id, and how the hub refuses it: status, code, what must be said.
REFUSED = {
    "gemma-2b": (
        "google/gemma-2b", 403, "GatedRepo",
        ["https://huggingface.co/google/gemma-2b", "HF_TOKEN", "model.path="],
    ),
    "gemma-2-2b": (
        "google/gemma-2-2b", 404, "RepoNotFound",
        ["knows no 'google/gemma-2-2b'", "model.path="],
    ),
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """A hub that refuses everything in the way the real one does."""

    def do_HEAD(self) -> None:
        (found,) = (case for case in REFUSED.values() if f"{case[0]}/" in f"{self.path}/")
        _, status, code, _ = found
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, str, str]]]:
    """Exit code, stdout and stderr of `lorabench plan` by model, in a process of this hub's."""
    code = """
import contextlib, io, json, sys
from lorabench import cli
found = {}
for model in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["plan", f"model={model}", "tracker=none"])
    found[model] = code, out.getvalue(), err.getvalue()
print(json.dumps(found))
"""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *REFUSED],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | hub,
        )
        assert not done.stderr, done.stderr
        yield json.loads(done.stdout)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("model", REFUSED)
def test_a_hub_that_refuses_is_told_in_one_line(
    model: str, told: dict[str, tuple[int, str, str]]
) -> None:
    code, out, err = told[model]
    assert code == 2 and not out
    (line,) = err.strip().splitlines()
    assert line.startswith("model.path: ")
    for part in REFUSED[model][-1]:
        assert part in line


def test_no_network_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve, as on a machine without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = say("plan", "model=qwen3-0.6b", "tracker=none")
    assert said.code == 2
    (line,) = said.lines
    assert "hub.invalid does not resolve" in line and "model.path=/path/to/checkpoint" in line


def test_the_bases_own_dropouts_are_off(tiny_folder: Callable[[str], Path]) -> None:
    config = composed("model=local", f"model.path={tiny_folder('gpt2')}")
    base = base_model.load(config.model, "cpu").train()
    found = [m.p for m in base.modules() if isinstance(m, torch.nn.Dropout)]
    assert found and set(found) == {0.0}
    ids = torch.arange(5)[None]
    assert torch.equal(base(input_ids=ids).logits, base(input_ids=ids).logits)


def test_a_shared_tree_shares_tensors_and_nothing_else() -> None:
    base = base_model.load(composed().model, "cpu")
    tree = base_model.share(base, owned={"model.norm.weight"}.__contains__)
    ours, theirs = dict(base.named_parameters()), dict(tree.named_parameters())
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] is not theirs[name]} == {"model.norm.weight"}
    assert base_model.is_tied(tree) and base_model.is_tied(base)
    assert tree.config is not base.config
    tree.model.layers[0].self_attn.q_proj = torch.nn.Identity()
    assert isinstance(base.model.layers[0].self_attn.q_proj, torch.nn.Linear)


def test_embedded_base_that_does_not_exist_names_those_that_do() -> None:
    (error,) = base_model.check(composed("model.path=lorabench:tiny-gema").model)
    assert "tiny-gemma" in error
