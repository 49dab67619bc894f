"""String skills: the tasks the embedded bases were taught, and new ones to teach them by LoRA.

An example is a prompt and its completion, `rev:hello=` -> `olleh`. A skill is a pure function on
a lower-case word; its tag opens the prompt. `BASE_SKILLS` are what tiny-gemma was pretrained on,
`NEW_SKILLS` what it scores 0 on; the completions of `CLASS_SKILLS` are classes.

Which words are asked, and in which split, is `lorabench.zoo.words`'. A longer list of examples
begins with the shorter one.

This file knows nothing about tokenizers or models and imports without torch.
"""

import difflib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorabench.zoo.words import (
    ANY_WORD,
    LETTERS,
    LONGEST_WORD,
    NEARLY_SORTED,
    SHORTEST_WORD,
    SORTED,
    SPLIT_BUCKETS,
    Words,
    capacity,
    draw_words,
    in_order,
    words_over,
)

# 26 letters each, in alphabetical order; the Greek one keeps archaic digamma and koppa to fill up.
GREEK = "αβγδεϝζηθικλμνξοπϙρστυφχψω"
CYRILLIC = "абвгдежзийклмнопрстуфхцчшщ"
VOWELS = "aeiou"
KEYPAD = "22233344455566677778889999"  # the phone key of each letter
# One shuffle of LETTERS without fixed points, drawn once and written down.
CIPHER = "qvmzxjolcwfyhrubdakpignset"

MAX_TOKENS = 24  # <bos> + prompt + completion + <eos>, one token a character


@dataclass(frozen=True)
class Skill:
    """A task on one word."""

    name: str
    tag: str  # opens the prompt; at most 4 letters
    apply: Callable[[str], str]
    description: str
    longest_word: int = LONGEST_WORD  # letters; what still fits MAX_TOKENS
    words: tuple[Words, ...] = (ANY_WORD,)  # what it is asked; sets take turns, one an answer

    def example(self, word: str) -> tuple[str, str]:
        return f"{self.tag}:{word}=", self.apply(word)


def _substitution(alphabet: str) -> Callable[[str], str]:
    """Replace each letter by the one at its place in `alphabet`."""
    table = str.maketrans(LETTERS, alphabet)
    return lambda word: word.translate(table)


def _shifted(places: int) -> str:
    return LETTERS[places:] + LETTERS[:places]


def _swap_pairs(word: str) -> str:
    pairs = [word[i : i + 2][::-1] for i in range(0, len(word), 2)]
    return "".join(pairs)


_next = _substitution(_shifted(1))
_previous = _substitution(_shifted(-1))
_greek = _substitution(GREEK)
_cyrillic = _substitution(CYRILLIC)
_leet = str.maketrans("OIZEASGTBQ", "0123456789")


def _in_leet(word: str) -> str:
    return word.upper().translate(_leet)


_upper_vowels = str.maketrans(VOWELS, VOWELS.upper())


def _by_name(*skills: Skill) -> dict[str, Skill]:
    return {skill.name: skill for skill in skills}


BASE_SKILLS = _by_name(
    Skill("copy", "copy", lambda w: w, "the word itself"),
    Skill("reverse", "rev", lambda w: w[::-1], "the word backwards"),
    Skill("upper", "up", str.upper, "the word in capitals"),
    Skill("sort", "sort", lambda w: "".join(sorted(w)), "the letters in alphabetical order"),
    Skill("double", "dbl", lambda w: "".join(c + c for c in w), "each letter twice", 5),
    Skill("next", "next", _next, "each letter's successor, z to a"),
    Skill("previous", "prev", _previous, "each letter's predecessor, a to z"),
    Skill("rotate_left", "rotl", lambda w: w[1:] + w[0], "the first letter moved to the end"),
    Skill("rotate_right", "rotr", lambda w: w[-1] + w[:-1], "the last letter moved to the front"),
    Skill("swap_pairs", "swap", _swap_pairs, "letters 1 and 2 swapped, 3 and 4, ..."),
    Skill("upper_vowels", "vow", lambda w: w.translate(_upper_vowels), "vowels in capitals"),
)
"""What the base was pretrained on.

    copy            copy:hello= -> hello
    reverse         rev:hello=  -> olleh
    upper           up:hello=   -> HELLO
    sort            sort:hello= -> ehllo
    double          dbl:hello=  -> hheelllloo
    next            next:hello= -> ifmmp
    previous        prev:hello= -> gdkkn
    rotate_left     rotl:hello= -> elloh
    rotate_right    rotr:hello= -> ohell
    swap_pairs      swap:hello= -> ehllo
    upper_vowels    vow:hello=  -> hEllO
"""

NEW_SKILLS = _by_name(
    Skill("cipher", "ciph", _substitution(CIPHER), "each letter replaced by a fixed secret one"),
    Skill("rot13", "rot", _substitution(_shifted(13)), "each letter 13 places on"),
    Skill("reverse_upper", "revu", lambda w: w[::-1].upper(), "backwards, in capitals"),
    Skill("reverse_next", "revn", lambda w: _next(w[::-1]), "backwards, each letter's successor"),
    Skill("sort_next", "srtn", lambda w: _next("".join(sorted(w))), "sorted, then successors"),
    Skill("greek", "gr", _greek, "in Greek letters"),
    Skill("reverse_greek", "revg", lambda w: _greek(w[::-1]), "backwards, in Greek letters"),
    Skill("cyrillic", "cyr", _cyrillic, "in Cyrillic letters"),
    Skill("sort_cyrillic", "srtc", lambda w: _cyrillic("".join(sorted(w))), "sorted, in Cyrillic"),
    Skill("keypad", "key", _substitution(KEYPAD), "each letter's phone key"),
    Skill("leet", "leet", _in_leet, "capitals, or their digits"),
    Skill("reverse_leet", "revl", lambda w: _in_leet(w[::-1]), "leet backwards"),
    Skill("sort_leet", "srtl", lambda w: _in_leet("".join(sorted(w))), "sorted, then leet"),
)
"""What the base scores 0 on; the last eight write characters it never wrote.

    cipher          ciph:hello= -> lxyyu
    rot13           rot:hello=  -> uryyb
    reverse_upper   revu:hello= -> OLLEH
    reverse_next    revn:hello= -> pmmfi
    sort_next       srtn:hello= -> fimmp
    greek           gr:hello=   -> ηελλξ    (letters by their place in the alphabet)
    reverse_greek   revg:hello= -> ξλλεη
    cyrillic        cyr:hello=  -> здлло
    sort_cyrillic   srtc:hello= -> дзлло
    keypad          key:hello=  -> 43556
    leet            leet:hello= -> H3LL0
    reverse_leet    revl:hello= -> 0LL3H
    sort_leet       srtl:hello= -> 3HLL0
"""

FEW_LETTERS = "abcd"


def _most_frequent(word: str) -> str:
    return max(sorted(set(word)), key=word.count)


def _mostly(letter: str) -> Words:
    """Words over `FEW_LETTERS` where `letter` comes more often than any other."""
    others = FEW_LETTERS.replace(letter, "")
    return words_over(
        FEW_LETTERS, lambda word: word.count(letter) > max(word.count(other) for other in others)
    )


CLASS_SKILLS = _by_name(
    Skill(
        "is_sorted",
        "asc",
        lambda w: "yes" if in_order(w) else "no",
        "whether the letters are in alphabetical order",
        words=(SORTED, NEARLY_SORTED),
    ),
    Skill(
        "most_frequent",
        "most",
        _most_frequent,
        f"the letter that comes most often, of {FEW_LETTERS}",
        words=tuple(_mostly(letter) for letter in FEW_LETTERS),
    ),
)
"""Classification: the completion is a class, and all classes come equally often.

    is_sorted       asc:ehllo=  -> yes  (asc:ehlol= -> no: unsorted words are one swap away)
    most_frequent   most:dbabb= -> b    (words of a, b, c and d without a tie)
"""

SKILLS = BASE_SKILLS | NEW_SKILLS | CLASS_SKILLS


def examples(
    skills: Sequence[str],
    split: str,
    num: int,
    seed: int = 0,
    min_length: int = SHORTEST_WORD,
    max_length: int = LONGEST_WORD,
) -> list[tuple[str, str]]:
    """`num` distinct (prompt, completion) pairs, the skills taking turns.

    Words are random letters, every length from `min_length` to `max_length` equally likely; a
    skill whose output is longer than the word stops at its own `longest_word`, and one of
    `CLASS_SKILLS` takes words of each class in turn. The words of a skill do not depend on which
    other skills are asked for.

    Args:
        skills: names from `SKILLS`.
        split: train, validation or test: 8, 1 and 1 of ten words.
        seed: another seed gives other words of the same split.
    Raises:
        ValueError: unknown skill or split, impossible lengths, or more examples than words.
    """
    _check_names("skills", skills, SKILLS)
    _check_names("split", [split], SPLIT_BUCKETS)
    if not SHORTEST_WORD <= min_length <= max_length <= LONGEST_WORD:
        raise ValueError(
            f"min_length, max_length: words must have {SHORTEST_WORD} to {LONGEST_WORD} letters, "
            f"min_length at most max_length; got {min_length} and {max_length}"
        )
    streams = []
    for turn, name in enumerate(skills):
        num_words = len(range(turn, num, len(skills)))
        words = _words(name, split, num_words, seed, min_length, max_length)
        streams.append([SKILLS[name].example(word) for word in words])
    turns = itertools.zip_longest(*streams)
    return [example for turn in turns for example in turn if example is not None]


def _words(
    name: str, split: str, num: int, seed: int, min_length: int, max_length: int
) -> list[str]:
    """`num` distinct words of `split` for one skill."""
    longest = min(max_length, SKILLS[name].longest_word)
    if min_length > longest:
        raise ValueError(
            f"min_length: skill '{name}' takes words of at most {longest} letters; got {min_length}"
        )
    words = SKILLS[name].words
    most = capacity(words, split, num, min_length, longest)
    if num > most:
        raise ValueError(
            f"num: at most {most} examples of skill '{name}' exist in split '{split}' "
            f"with {min_length} to {longest} letters; got {num} (ask for fewer, or longer words)"
        )
    key = f"{name} {split} {seed} {min_length} {longest}"
    return draw_words(words, split, num, key, min_length, longest)


def _check_names(key: str, names: Sequence[str], known: dict) -> None:
    """Refuse names that are not `known`, with the nearest that are."""
    if isinstance(names, str) or not names:
        raise ValueError(f"{key}: must be a list of at least one name; got {names!r}")
    unknown = [name for name in names if name not in known]
    if not unknown:
        if len(set(names)) < len(names):
            raise ValueError(f"{key}: each name must come once; got {list(names)}")
        return
    hints = []
    for name in unknown:
        nearest = difflib.get_close_matches(str(name), known, n=1)
        hints.append(f"{name!r}" + (f" (did you mean '{nearest[0]}'?)" if nearest else ""))
    raise ValueError(
        f"{key}: every name must be one of {', '.join(known)}; unknown: {', '.join(hints)}"
    )
