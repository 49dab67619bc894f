"""Which run a word of the command line means. Imports without torch."""

from __future__ import annotations

import glob
from pathlib import Path

from lorabench.config import ConfigErrors, and_more, nearest

OUTPUTS = Path("outputs")  # output_dir by default, where ids without a folder are looked for


def folder_of(word: str | Path, must_exist: bool = True) -> Path:
    """The folder of a run: itself, or the only one whose id begins so.

    Args:
        word: a folder, such as outputs/lm_head/0a1b2c3d4e5f; or the first digits of an id, with the
            folder of its sweep before them or below outputs/.
        must_exist: else a word that no run begins with is returned as it is.
    Raises:
        ConfigErrors: several runs begin so; or none does.
    """
    path = Path(word)
    if path.exists():
        return path
    place = str(word).rpartition("/")[0]
    pattern = f"{glob.escape(path.name)}*/record.json"
    found = Path(place).glob(pattern) if place else OUTPUTS.glob(f"*/{pattern}")
    runs = sorted(one.parent for one in found)
    if len(runs) == 1:
        return runs[0]
    if runs:
        raise ConfigErrors(
            f"RUN: must begin as one run alone; '{word}' begins "
            f"{and_more([str(one) for one in runs])}; give more digits"
        )
    if not must_exist:
        return path
    there = sorted(Path(place).glob("*/record.json") if place else OUTPUTS.glob("*/*/record.json"))
    ids = [one.parent.name for one in there]
    near = f"; nearest: {', '.join(nearest(path.name, ids, 3))}" if ids else ""
    raise ConfigErrors(
        f"RUN: must be the folder of a run or the beginning of its id; "
        f"'{word}' does not exist{near}"
    )
