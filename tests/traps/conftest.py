"""What a trap's test asks of plain PEFT, and of which versions."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

INSTALLED = f"peft {version('peft')}, transformers {version('transformers')}"
# On these every trap was seen to be there; a version that has mended one is told, not failed.
MEASURED = {
    "peft 0.21.2, transformers 5.23.0",
    "peft 0.20.0, transformers 5.23.0",
    "peft 0.19.1, transformers 5.17.0",
}


class FallsIn:
    """Asserts that plain PEFT falls in, on the versions that do."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def __call__(self, holds: bool, told: Any = "", *, since: str = "0.19") -> None:
        """
        Args:
            told: what was measured, shown where it does not hold.
            since: the first peft with this trap; an older one has another, or none.
        """
        if parts(version("peft")) < parts(since):
            self.notes.append(f"this trap came with peft {since}")
        elif not holds and INSTALLED not in MEASURED:
            self.notes.append(f"mended, take it out of docs/traps.md ({told})")
        else:
            assert holds, told


def parts(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The HF Trainer collects garbage at every start: longer than it trains a tiny model."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


@pytest.fixture
def falls_in() -> Iterator[FallsIn]:
    """Skipped with the reason after lorabench's half has run, where plain PEFT does not fall in."""
    check = FallsIn()
    yield check
    if check.notes:
        pytest.skip(f"plain PEFT's half, {INSTALLED}: " + "; ".join(dict.fromkeys(check.notes)))
