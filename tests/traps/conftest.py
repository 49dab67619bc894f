"""What a trap's test asks of plain PEFT, and of which versions."""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest


def parts(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The HF Trainer collects garbage at every start: longer than it trains a tiny model."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


@pytest.fixture
def falls_in() -> Callable[..., None]:
    """Asserts that plain PEFT falls in, on the versions that do, and on them alone."""

    def check(holds: bool, told: Any = "", *, since: str = "0.19") -> None:
        """
        Args:
            told: what was measured, shown where it is another thing.
            since: the first peft with this trap; an older one has another, or none.
        """
        there = parts(version("peft")) >= parts(since)
        assert bool(holds) == there, f"docs/traps.md is wrong for this peft: {told}"

    return check
