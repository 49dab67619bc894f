"""The base: hub failures told in one line by the real client, tokens shared, dropouts off."""

from __future__ import annotations

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
        found = [case for case in REFUSED.values() if f"{case[0]}/" in f"{self.path}/"]
        _, status, code, _ = found[0] if found else ("", 404, "EntryNotFound", [])
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of this hub."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Let the hub's client ask this address; it read its environment when it was imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize("model", REFUSED)
def test_a_hub_that_refuses_is_told_in_one_line(
    model: str, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(monkeypatch, hub, tmp_path)
    said = say("plan", f"model={model}", "tracker=none")
    assert said.code == 2 and not said.out
    assert len(said.lines) == 1, said.err
    (line,) = said.lines
    assert line.startswith("model.path: ")
    for part in REFUSED[model][-1]:
        assert part in line


def test_no_network_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve, as on a machine without a network."""
    ask(monkeypatch, "https://hub.invalid", tmp_path)
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
