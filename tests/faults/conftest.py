"""What the sweeps that are broken here end with if nothing happens to them."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import say

from faults.sweeps import CHECKPOINTED, outcome


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of each kind; in this process, so that forks find everything imported."""
    found = {}
    for kind, words in CHECKPOINTED.items():
        folder = tmp_path_factory.mktemp(kind)
        assert say(*words, f"output_dir={folder}").code == 0
        found[kind] = outcome(folder)
    return found
