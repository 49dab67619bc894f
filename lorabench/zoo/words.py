"""The words that skills are asked: sets to draw from, and the one split a word belongs to.

Each word belongs to exactly one split, by a hash of the word alone, so no word of a test example
occurs in a train example, whatever the skill, seed or number. What is drawn depends on the
arguments only: not on the global random state, PYTHONHASHSEED or the Python version.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORTEST_WORD, LONGEST_WORD = 3, 8

# Of ten words, which hash buckets go to which split.
SPLIT_BUCKETS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}

Uniform = Callable[[], float]  # random.Random(...).random: the one draw whose values Python keeps


@dataclass(frozen=True)
class Words:
    """A set of words."""

    draw: Callable[[Uniform, int], str]  # one word of that many letters
    every: Callable[[int], Iterable[str]]  # all words of that many letters


def words_over(letters: str, kept: Callable[[str], bool] = lambda word: True) -> Words:
    """The words over `letters` that are `kept`, all of a length equally likely."""

    def draw(uniform: Uniform, length: int) -> str:
        while not kept(word := _random_letters(uniform, letters, length)):
            pass
        return word

    def every(length: int) -> Iterable[str]:
        return filter(kept, map("".join, itertools.product(letters, repeat=length)))

    return Words(draw, every)


def _random_letters(uniform: Uniform, letters: str, length: int) -> str:
    return "".join(letters[int(uniform() * len(letters))] for _ in range(length))


def in_order(word: str) -> bool:
    """Whether the letters are in alphabetical order, equal neighbours allowed."""
    return list(word) == sorted(word)


ANY_WORD = words_over(LETTERS)


def _draw_sorted(uniform: Uniform, length: int) -> str:
    return "".join(sorted(_random_letters(uniform, LETTERS, length)))


def _every_sorted(length: int) -> Iterable[str]:
    return map("".join, itertools.combinations_with_replacement(LETTERS, length))


def _swapped(word: str, place: int) -> str:
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _draw_nearly_sorted(uniform: Uniform, length: int) -> str:
    while True:
        word = _draw_sorted(uniform, length)
        swapped = _swapped(word, int(uniform() * (length - 1)))
        if swapped != word:  # equal neighbours
            return swapped


def _every_nearly_sorted(length: int) -> Iterable[str]:
    for word in _every_sorted(length):
        for place in range(length - 1):
            if word[place] != word[place + 1]:
                yield _swapped(word, place)


SORTED = Words(_draw_sorted, _every_sorted)
NEARLY_SORTED = Words(_draw_nearly_sorted, _every_nearly_sorted)
"""Two neighbours of a sorted word swapped: neither its letters nor its ends tell it from one."""


def split_of(word: str) -> str:
    """The only split `word` may occur in."""
    bucket = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % 10
    return next(split for split, buckets in SPLIT_BUCKETS.items() if bucket in buckets)


def draw_words(
    sets: Sequence[Words], split: str, num: int, key: str, min_length: int, max_length: int
) -> list[str]:
    """`num` distinct words of `split`, the sets taking turns, every length equally likely.

    The lengths are equal as long as short words last.

    Args:
        sets: no two of them share a word.
        key: another key gives other words; a longer list begins with the shorter one.
    """
    stream = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big"))
    words: dict[str, None] = {}  # keeps the order drawn
    while len(words) < num:
        length = min_length + int(stream.random() * (max_length - min_length + 1))
        word = sets[len(words) % len(sets)].draw(stream.random, length)
        if split_of(word) == split:
            words[word] = None
    return list(words)


def capacity(sets: Sequence[Words], split: str, num: int, min_length: int, max_length: int) -> int:
    """How many words `draw_words` can draw, counted no further than `num`."""

    def count(words: Words, enough: int) -> int:
        every = (word for n in range(min_length, max_length + 1) for word in words.every(n))
        mine = (word for word in every if split_of(word) == split)
        return sum(1 for _ in itertools.islice(mine, enough))

    # A set is asked at its turn, at turn + len(sets), ...: it ends the list at the first turn
    # for which it has no word left.
    ends = [
        turn + len(sets) * count(words, len(range(turn, num, len(sets))))
        for turn, words in enumerate(sets)
    ]
    return min([num, *ends])
