"""Checkpoints of a run: saved whole or not at all, checked before they are trusted.

A checkpoint is a folder with `state.safetensors` (trained parameters, optimizer moments) and
`checkpoint.json` (steps done, fingerprint, checksum of the tensors).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Mismatch(ValueError):
    """A checkpoint that belongs to another run, or is damaged."""


def save(
    folder: Path, state: dict[str, Tensor], steps_done: int, fingerprint: dict[str, Any]
) -> None:
    """Replace the checkpoint in `folder` by this one; a crash leaves the old or the new."""
    from safetensors.torch import save_file

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    file = part / "state.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, file)
    content = {
        "steps_done": steps_done,
        "fingerprint": fingerprint,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    (part / "checkpoint.json").write_text(json.dumps(content, indent=2) + "\n")
    for path in part.iterdir():
        with open(path, "rb") as written:
            os.fsync(written.fileno())
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, fingerprint: dict[str, Any]) -> tuple[dict[str, Tensor], int] | None:
    """The saved state and steps done; None where there is no checkpoint.

    Raises:
        Mismatch: another fingerprint (every difference is listed), or damaged tensors.
    """
    from safetensors.torch import load_file

    old = folder.with_name(f".{folder.name}.old")
    if not (folder / "checkpoint.json").is_file():
        if not (old / "checkpoint.json").is_file():
            return None
        folder = old  # the process died between the two renames of `save`
    content = json.loads((folder / "checkpoint.json").read_text())
    differences = [
        f"{key}: {content['fingerprint'].get(key)!r} -> {fingerprint.get(key)!r}"
        for key in sorted({*content["fingerprint"], *fingerprint})
        if content["fingerprint"].get(key) != fingerprint.get(key)
    ]
    if differences:
        raise Mismatch(
            f"checkpoint {folder}: must come from the same run; it differs in "
            + "; ".join(differences)
            + f"; remove {folder} to start the run again"
        )
    file = folder / "state.safetensors"
    if hashlib.sha256(file.read_bytes()).hexdigest() != content["sha256"]:
        raise Mismatch(
            f"checkpoint {folder}: its tensors are damaged; remove the folder to start again"
        )
    return load_file(file), content["steps_done"]


def remove(folder: Path) -> None:
    """Forget the checkpoint of a finished run."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f".{folder.name}.old"), ignore_errors=True)
