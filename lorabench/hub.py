"""The Hub as this machine sees it: its cache, its token, and one line for every refusal.

Imports without torch; huggingface_hub is imported where it is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lorabench.config import and_more, first_line

Kind = Literal["model", "dataset"]
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def token_source() -> str:
    """Return where the token sent to the Hub comes from, or that there is none."""
    from huggingface_hub import constants

    for name in TOKENS:
        if os.environ.get(name):
            return f"from {name} in the environment"
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return "none, HF_HUB_DISABLE_IMPLICIT_TOKEN is set"
    if Path(constants.HF_TOKEN_PATH).is_file():
        return f"from the login in {constants.HF_TOKEN_PATH}"
    return "none"


def cached_revisions(path: str, kind: Kind = "model") -> list[str]:
    """Return the commits of a repository that are in this machine's cache, newest first."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=path, repo_type=kind)
    found = Path(constants.HF_HUB_CACHE, name, "snapshots").glob("*")
    if kind == "model":
        found = (folder for folder in found if (folder / "config.json").is_file())
    return [p.name for p in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)]


def hub_failure(key: str, path: str, error: BaseException, kind: Kind = "model") -> str:
    """Return one line for a Hub that does not answer, refuses, or does not know the name.

    Args:
        key: what names the repository: model.path, data.train.path.
        error: of huggingface_hub, or of a library that calls it.
    """
    from huggingface_hub import constants

    chain = list(_causes(error))
    status = next((code for one in chain if (code := _status(one))), None)
    kinds = {type(one).__name__ for one in chain}
    text = f"{type(error).__name__}: {error}"
    unknown = bool(kinds & {"RepositoryNotFoundError", "RevisionNotFoundError"})
    is_gated = "GatedRepoError" in kinds or status == 403
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{path}"
    local = f"give a local folder with {key}=/path/to/{'checkpoint' if kind == 'model' else 'data'}"
    # The client's text for an unknown name speaks of gated ones too.
    if is_gated or (not unknown and re.search(r"\b403\b|[Gg]ated", text)):
        told = (
            f"{key}: '{path}' is gated or private and this machine may not read it (token: "
            f"{token_source()}); accept the licence at {page} and set HF_TOKEN, or {local}"
        )
    elif unknown or status in (401, 404) or re.search(r"not a valid model id|\b401\b", text):
        told = (
            f"{key}: the hub knows no '{path}' at that revision, or it is private (token: "
            f"{token_source()}); check the name and the token, or {local}"
        )
    elif constants.HF_HUB_OFFLINE:
        told = (
            f"{key}: '{path}' is no local folder, and cannot be had from the hub while "
            f"HF_HUB_OFFLINE is set; run `lorabench fetch` with the same words where there is a "
            f"network, or {local}"
        )
    else:
        told = (
            f"{key}: '{path}' is no local folder and cannot be had from the hub "
            f"({first_line(error)}); {local}, or run `lorabench fetch` with the same words where "
            f"there is a network"
        )
    cached = cached_revisions(path, kind)
    if cached:
        revision = f"{key.removesuffix('path')}revision"
        told += f"; cached: {and_more(cached)}; use {revision}={cached[0]}"
    return told


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from: transformers wraps those of the client."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
