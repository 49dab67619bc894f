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
    """Make this the newest checkpoint in `folder`."""
    write(folder, state, steps_done, fingerprint)
    commit(folder)


def write(
    folder: Path, state: dict[str, Tensor], steps_done: int, fingerprint: dict[str, Any]
) -> None:
    """Write a checkpoint beside `folder`; `commit` puts it in place."""
    from safetensors.torch import save_file

    part = _beside(folder, "part")
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


def commit(folder: Path) -> None:
    """Put what `write` wrote in place.

    The one before is kept: a pack that dies between its members' commits still has a step that
    all of them share.
    """
    old = _beside(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    _beside(folder, "part").rename(folder)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def steps(folder: Path, pack: str | None = None) -> dict[int, Path]:
    """The checkpoints there are, by their steps done.

    Args:
        pack: leave out those of another pack, whose shapes gave other bits.
    """
    found = {}
    for place in (_beside(folder, "old"), folder):
        try:
            content = json.loads((place / "checkpoint.json").read_text())
        except (OSError, ValueError):
            continue
        if pack is None or content["fingerprint"].get("pack") == pack:
            found[content["steps_done"]] = place
    return found


def load(folder: Path, step: int, fingerprint: dict[str, Any]) -> dict[str, Tensor]:
    """The state saved at a step out of `steps`.

    Raises:
        Mismatch: another fingerprint (every difference is listed), or damaged tensors.
    """
    from safetensors.torch import load_file

    place = steps(folder)[step]
    content = json.loads((place / "checkpoint.json").read_text())
    saved = content["fingerprint"]
    differences = [
        f"{key}: {saved.get(key)!r} -> {fingerprint.get(key)!r}"
        for key in sorted({*saved, *fingerprint})
        if saved.get(key) != json.loads(json.dumps(fingerprint.get(key)))
    ]
    if differences:
        raise Mismatch(
            f"checkpoint {place}: must come from the same run; it differs in "
            + "; ".join(differences)
            + f"; remove {place} to start the run again"
        )
    file = place / "state.safetensors"
    if hashlib.sha256(file.read_bytes()).hexdigest() != content["sha256"]:
        raise Mismatch(f"checkpoint {place}: its tensors are damaged; remove the folder")
    return load_file(file)


def remove(folder: Path) -> None:
    """Forget the checkpoints of a finished run."""
    for place in (folder, _beside(folder, "old"), _beside(folder, "part")):
        shutil.rmtree(place, ignore_errors=True)
