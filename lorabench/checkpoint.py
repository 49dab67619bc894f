"""Checkpoints of a run: saved whole or not at all, checked before they are trusted.

A checkpoint is a folder with `state.safetensors` (trained parameters, optimizer moments) and
`checkpoint.json` (steps done, fingerprint, hash of the tensors, what a resumed run must know, and a
checksum over all of that).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import files
from lorabench.files import share, sync, sync_folder

if TYPE_CHECKING:
    from torch import Tensor


class Mismatch(ValueError):
    """A checkpoint that belongs to another run."""


class Damaged(ValueError):
    """A checkpoint that is not what was written."""


def write(
    folder: Path,
    state: dict[str, Tensor],
    steps_done: int,
    fingerprint: dict[str, Any],
    told: dict[str, Any] | None = None,
    token: int = 0,
) -> None:
    """Write a checkpoint beside `folder`; `commit` puts it in place.

    Args:
        steps_done: by the pack.
        told: what the run that resumes from here must know, as JSON.
        token: of the process that writes, so that no other one writes into the same place.
    """
    from safetensors.torch import save_file

    part = _beside(folder, f"{token}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    file = part / "state.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, file)
    content = {
        "steps_done": steps_done,
        "fingerprint": fingerprint,
        "told": told or {},
        "sha256": _sha256(file),
    }
    content["checksum"] = _checksum(content)
    (part / "checkpoint.json").write_text(json.dumps(content, indent=2) + "\n")
    share(part)
    sync_folder(part)


def commit(folder: Path, token: int = 0) -> None:
    """Put what `write` wrote in place.

    The one before is kept: a pack that dies between its members' commits still has a step that
    all of them share.
    """
    old = _beside(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    _beside(folder, f"{token}.part").rename(folder)
    sync(folder.parent)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def steps(folder: Path, pack: str | None = None) -> dict[int, Path]:
    """The checkpoints there are, by their steps done; their tensors are not looked at.

    Args:
        pack: leave out those of another pack, whose shapes gave other bits.
    """
    found = {}
    for place in _places(folder):
        try:
            content = _content(place)
        except (OSError, Damaged):
            continue
        if pack is None or content["fingerprint"].get("pack") == pack:
            found[content["steps_done"]] = place
    return found


def set_damaged_aside(folder: Path) -> list[str]:
    """Rename checkpoints that are not what was written, so that an earlier one is used.

    Returns:
        What was wrong with each, and where it lies now.
    """
    told = []
    for place in _places(folder):
        if not os.path.lexists(place):
            continue
        try:
            content = _content(place)
            if _sha256(place / "state.safetensors") != content["sha256"]:
                raise Damaged("its tensors are not those it was written with")
        except (FileNotFoundError, NotADirectoryError) as error:
            why = f"{Path(error.filename).name} is missing"
        except OSError as error:  # a bad sector, a folder in the place of a file
            why = f"it cannot be read: {error.strerror}"
        except Damaged as error:
            why = str(error)
        else:
            continue
        aside = _aside(place)
        files.remove(aside)
        place.rename(aside)
        told.append(f"checkpoint {place} is damaged ({why}) and was set aside as {aside.name}")
    return told


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name.lstrip('.')}.damaged")


def _places(folder: Path) -> tuple[Path, Path]:
    """Where checkpoints lie: the one before, and the last one."""
    return _beside(folder, "old"), folder


def told(folder: Path, step: int) -> dict[str, Any]:
    """What was written for the run that resumes."""
    return dict(_content(steps(folder)[step])["told"])


def _content(place: Path) -> dict[str, Any]:
    """checkpoint.json.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        content = json.loads((place / "checkpoint.json").read_bytes())
    except ValueError as error:  # no JSON, or no UTF-8
        raise Damaged("checkpoint.json cannot be read") from error
    if not isinstance(content, dict) or content.get("checksum") != _checksum(content):
        raise Damaged("checkpoint.json does not fit its checksum")
    if "told" not in content:
        raise Damaged("an earlier lorabench wrote it")
    return content


def _checksum(content: dict[str, Any]) -> str:
    """A hash over everything in checkpoint.json, and so over the tensors, whose hash is in it."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load(folder: Path, step: int, fingerprint: dict[str, Any]) -> dict[str, Tensor]:
    """The state saved at a step out of `steps`.

    Raises:
        Mismatch: another fingerprint; every difference is listed.
        Damaged: the tensors are not those it was written with.
    """
    from safetensors.torch import load_file

    place = steps(folder)[step]
    content = _content(place)
    found = differences(content["fingerprint"], fingerprint)
    if found:
        raise Mismatch(_refusal(place, found))
    file = place / "state.safetensors"
    if _sha256(file) != content["sha256"]:
        raise Damaged(f"checkpoint {place} was damaged after it was checked; repeat the command")
    return load_file(file)


def check(folder: Path, pack: str, planned: dict[str, Any]) -> list[str]:
    """What speaks against resuming from `folder`, known from a plan alone, a line per checkpoint.

    Args:
        pack: checkpoints of another pack are not resumed from, so nothing is said of them.
        planned: the part of the fingerprint that is there before anything is loaded.
    """
    errors = []
    for place in steps(folder, pack).values():
        saved = _content(place)["fingerprint"]
        known = {key: value for key, value in saved.items() if key in planned}
        if found := differences(known, planned):
            errors.append(_refusal(place, found))
    return errors


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Every value that differs, by its dotted key, old and new."""
    new = json.loads(json.dumps(new))
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]


def _refusal(place: Path, found: list[str]) -> str:
    return (
        f"checkpoint {place}: must come from the same run; it differs in {'; '.join(found)}; "
        f"go back to what it was, or remove {place} to start the run again"
    )


def remove(folder: Path) -> None:
    """Forget the checkpoints of a finished run."""
    for place in (
        *_places(folder),
        *map(_aside, _places(folder)),
        *folder.parent.glob(f".{folder.name}.*.part"),
    ):
        files.remove(place)
