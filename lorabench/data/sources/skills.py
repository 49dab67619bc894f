"""Examples of data.source=skills, which are generated."""

from __future__ import annotations

from functools import lru_cache

from lorabench.config import DataConfig
from lorabench.data.templates import SPLITS
from lorabench.zoo import skills

KEYS = {  # what zoo.skills calls them
    "skills": "data.skills",
    "min_length": "data.min_word_length",
    "min_length, max_length": "data.min_word_length, data.max_word_length",
}


def skill_examples(cfg: DataConfig, split: str) -> list[tuple[str, str]]:
    """The generated examples of a split. Raises ValueError as `zoo.skills.examples`."""
    return _examples(
        tuple(cfg.skills),
        split,
        getattr(cfg, f"num_{split}"),
        cfg.min_word_length,
        cfg.max_word_length,
    )


@lru_cache(maxsize=32)
def _examples(names: tuple, split: str, num: int, shortest: int, longest: int) -> list:
    return skills.examples(names, split, num, min_length=shortest, max_length=longest)


def errors(cfg: DataConfig) -> list[str]:
    """Everything wrong with the skills and the numbers of examples."""
    if not cfg.skills:
        return []  # a range error
    found = []
    for split in SPLITS:
        key = f"data.num_{split}"
        if getattr(cfg, f"num_{split}") is None:
            found.append(
                f"{key}: must be given with data.source=skills, words are made to order; "
                f"got None; set {key}=512"
            )
            continue
        try:
            skill_examples(cfg, split)
        except ValueError as error:
            name, _, rest = str(error).partition(": ")
            found.append(f"{KEYS.get(name, key)}: {rest}")
    return found
