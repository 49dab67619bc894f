"""A base on the hub: the commit it is pinned to, and one line for every way it cannot be had."""

from __future__ import annotations

import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorabench.config import ConfigErrors, ModelConfig, first_line
from lorabench.model import foreign


def hub_commit(model: ModelConfig) -> str:
    """The commit a hub model is pinned to; a pinned one needs no network."""
    if is_pinned(model) and model.revision:
        return model.revision
    return _hub_commit(model.path, model.revision)


def is_pinned(model: ModelConfig) -> bool:
    """Whether `revision` is a commit, not a branch, a tag or nothing."""
    return re.fullmatch(r"[0-9a-f]{40}", model.revision or "") is not None


def unpinned(model: ModelConfig, contents: dict[str, str]) -> list[str]:
    """Say which commit a hub model without one is at, and how to keep it.

    Args:
        contents: of the plan; `hub` is empty for a folder.
    """
    if not contents["hub"] or is_pinned(model):
        return []
    what = f"is '{model.revision}', no commit" if model.revision else "is not set"
    commit = contents["revision"]
    return [
        f"model.revision {what}: '{model.path}' is at commit {commit} now, and the Hub may move "
        f"on; model.revision={commit} keeps it"
    ]


@lru_cache
def _hub_commit(path: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    wanted = revision or "main"
    cached = try_to_load_from_cache(path, "config.json", revision=wanted)
    if isinstance(cached, str):
        return Path(cached).parent.name
    try:
        return str(HfApi().model_info(path, revision=wanted).sha)
    except Exception as error:
        raise ConfigErrors(hub_failure("model.path", path, error)) from error


def pickled_on_hub(model: ModelConfig, content: dict[str, Any]) -> list[str]:
    """Refuse a base that has pickled weights on the hub, and no others.

    Args:
        content: its config.json.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import has_file

    revision = model.revision or "main"

    def is_cached(name: str) -> bool:
        return isinstance(try_to_load_from_cache(model.path, name, revision=revision), str)

    def is_there(name: str) -> bool:
        return bool(has_file(model.path, name, revision=revision))

    if any(map(is_cached, foreign.WEIGHTS)):
        return []
    try:
        if any(map(is_there, foreign.WEIGHTS)):
            return []
        pickled = list(filter(is_there, foreign.PICKLED))
    except Exception as error:  # also of the client's own HTTP library: a proxy that refuses
        raise ConfigErrors(hub_failure("model.path", model.path, error)) from error
    return [foreign.no_safetensors(model, content, pickled)] if pickled else []


def must_be_reachable(model: ModelConfig) -> None:
    """Refuse at once where the hub's name does not resolve: its client would retry for long."""
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants, try_to_load_from_cache

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision or "main")
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if isinstance(cached, str) or proxied or constants.HF_HUB_OFFLINE:
        return
    host = urlparse(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise ConfigErrors(
            hub_failure("model.path", model.path, OSError(f"no network: {host} does not resolve"))
        ) from error


def hub_failure(key: str, path: str, error: BaseException) -> str:
    """One line for a hub that does not answer, refuses, or does not know the name."""
    text = f"{type(error).__name__}: {error}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or re.search(r"\b(401|403)\b|[Gg]ated", text):
        return (
            f"{key}: '{path}' is gated or private and this machine may not read it; accept the "
            f"licence at https://huggingface.co/{path} and set HF_TOKEN, or give a local folder "
            f"with {key}=/path/to/checkpoint"
        )
    if (
        status == 404
        or "RepositoryNotFound" in text
        or "not a valid model id" in text
        or "RevisionNotFound" in text
    ):
        return (
            f"{key}: the hub knows no '{path}' at that revision; check the name, or give a local "
            f"folder with {key}=/path/to/checkpoint"
        )
    return (
        f"{key}: '{path}' is no local folder and cannot be had from the hub ({first_line(error)}); "
        f"give a local folder with {key}=/path/to/checkpoint, or run once with a network"
    )
