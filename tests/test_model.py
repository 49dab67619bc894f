"""The base: hub failures told in one line by the real client, tokens shared, dropouts off."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import composed

from lorabench import model as base_model


def answering(status: int, code: str) -> HTTPServer:
    """A hub that refuses everything in the way the real one does."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "no")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def planned(model: str, hub: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`lorabench plan` in a process that knows this hub alone."""
    return subprocess.run(
        [sys.executable, "-m", "lorabench", "plan", f"model={model}", "tracker=none"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)},
    )


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", ["https://huggingface.co/google/gemma-2b", "HF_TOKEN", "model.path="]),
        (404, "RepoNotFound", ["knows no 'google/gemma-2b'", "model.path="]),
    ],
)
def test_a_hub_that_refuses_is_told_in_one_line(
    status: int, code: str, said: list[str], tmp_path: Path
) -> None:
    server = answering(status, code)
    try:
        done = planned("gemma-2b", f"http://127.0.0.1:{server.server_port}", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("model.path: ")
    for part in said:
        assert part in line


def test_no_network_is_told_in_one_line(tmp_path: Path) -> None:
    """A name that does not resolve, as on a machine without a network."""
    done = planned("qwen3-0.6b", "https://hub.invalid", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
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
