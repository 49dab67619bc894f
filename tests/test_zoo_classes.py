"""Skills whose completion is a class: right, balanced, and without a short cut."""

import itertools
from collections import Counter

import pytest

from lorabench.zoo.skills import CLASS_SKILLS, MAX_TOKENS, SKILLS, examples
from lorabench.zoo.words import split_of

SPLITS = ["train", "validation", "test"]
CLASSES = {"is_sorted": ["yes", "no"], "most_frequent": ["a", "b", "c", "d"]}


def word_of(prompt):
    return prompt[prompt.index(":") + 1 : -1]


def is_sorted(word):
    return "yes" if all(a <= b for a, b in itertools.pairwise(word)) else "no"


def most_frequent(word):
    (first, num_first), *others = Counter(word).most_common()
    assert all(num < num_first for _, num in others), f"a tie in {word}"
    return first


REFERENCES = {"is_sorted": is_sorted, "most_frequent": most_frequent}


def test_registry():
    assert CLASS_SKILLS.keys() == CLASSES.keys() == REFERENCES.keys()
    assert CLASS_SKILLS.items() <= SKILLS.items()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CLASSES)
def test_labels_are_right_balanced_and_of_the_split(name, split):
    pairs = examples([name], split, 1001)
    assert len(set(pairs)) == 1001
    for prompt, completion in pairs:
        word = word_of(prompt)
        assert completion == REFERENCES[name](word)
        assert split_of(word) == split
        assert len(prompt) + len(completion) + 2 <= MAX_TOKENS  # <bos> and <eos>
    for num in (1, 50, 1001):  # of any first part
        counts = Counter(completion for _, completion in pairs[:num])
        shares = [counts[name] for name in CLASSES[name]]
        assert sum(shares) == num and max(shares) - min(shares) <= 1


@pytest.mark.parametrize("name", CLASSES)
def test_longer_lists_begin_with_shorter_ones_whatever_the_other_skills(name):
    pairs = examples([name], "train", 400, seed=2)
    assert examples([name], "train", 70, seed=2) == pairs[:70]
    assert examples(["greek", name], "train", 140, seed=2)[1::2] == pairs[:70]
    assert examples([name], "train", 400, seed=3) != pairs


def test_length_says_nothing_about_sortedness():
    pairs = examples(["is_sorted"], "train", 6000)
    for label in CLASSES["is_sorted"]:
        lengths = Counter(len(word_of(prompt)) for prompt, found in pairs if found == label)
        # Four standard deviations of 3,000 draws of one of six.
        assert all(abs(lengths[n] - 500) < 82 for n in range(3, 9)), lengths


def test_unsorted_words_are_one_swap_of_neighbours_away():
    for prompt, label in examples(["is_sorted"], "test", 400):
        word = word_of(prompt)
        falls = [i for i, (a, b) in enumerate(itertools.pairwise(word)) if a > b]
        assert len(falls) == (label == "no")
        for i in falls:
            assert is_sorted(word[:i] + word[i + 1] + word[i] + word[i + 2 :]) == "yes"


def capacity_by_hand(name, split, length):
    """The longest balanced list of all words there are."""
    letters = {"is_sorted": "abcdefghijklmnopqrstuvwxyz", "most_frequent": "abcd"}[name]
    counts = Counter()
    for word in map("".join, itertools.product(letters, repeat=length)):
        falls = sum(a > b for a, b in itertools.pairwise(word))
        if name == "is_sorted":
            # One fall alone: a swap of neighbours can undo it, or it is farther than one swap.
            near = falls == 0 or any(
                is_sorted(word[:i] + word[i + 1] + word[i] + word[i + 2 :]) == "yes"
                for i in range(length - 1)
            )
            if not near:
                continue
        elif sorted(Counter(word).values())[-2:-1] == [max(Counter(word).values())]:
            continue  # a tie
        if split_of(word) == split:
            counts[REFERENCES[name](word)] += 1
    for num, label in enumerate(itertools.cycle(CLASSES[name])):
        if not counts[label]:
            return num
        counts[label] -= 1


@pytest.mark.parametrize(
    ("name", "split", "length"),
    [
        ("is_sorted", "test", 3),
        ("most_frequent", "train", 3),
        ("most_frequent", "test", 3),
        ("most_frequent", "validation", 6),
    ],
)
def test_every_word_can_be_asked_for_and_no_more(name, split, length):
    capacity = capacity_by_hand(name, split, length)
    if capacity:
        pairs = examples([name], split, capacity, 0, length, length)
        assert len(set(pairs)) == capacity
    with pytest.raises(
        ValueError, match=rf"^num: at most {capacity} examples .*got {capacity + 1}"
    ):
        examples([name], split, capacity + 1, 0, length, length)
