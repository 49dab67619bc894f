"""The embedded base: its skills, its tokenizer, its checkpoint and the numbers on its card."""

import codecs
import json
import string
import subprocess
import sys

import pytest
import torch

from lorabench.zoo import TINY_GEMMA
from lorabench.zoo.skills import BASE_SKILLS, MAX_TOKENS, NEW_SKILLS, SKILLS, examples
from lorabench.zoo.words import split_of

WORDS = ["hello", "zzz", "abcdefgh", "azbycx", "quiz", "mno"]
SPLITS = ["train", "validation", "test"]


def successor(character):
    return "a" if character == "z" else chr(ord(character) + 1)


def by_place(first):
    """Letter number n of another alphabet, whose code points follow one another."""
    return lambda word: "".join(chr(ord(first) + ord(c) - ord("a")) for c in word)


# Each written another way than in skills.py.
REFERENCES = {
    "copy": str,
    "reverse": lambda w: "".join(reversed(w)),
    "upper": lambda w: w.swapcase(),
    "sort": lambda w: "".join(c * w.count(c) for c in string.ascii_lowercase),
    "double": lambda w: "".join(w[i // 2] for i in range(2 * len(w))),
    "next": lambda w: "".join(map(successor, w)),
    "rotate_left": lambda w: (w + w)[1 : len(w) + 1],
    "rotate_right": lambda w: (w + w)[len(w) - 1 : -1],
    "upper_vowels": lambda w: "".join(c.upper() if c in set("aeiou") else c for c in w),
    "rot13": lambda w: codecs.encode(w, "rot13"),
    "reverse_upper": lambda w: "".join(reversed(w.swapcase())),
    "reverse_next": lambda w: "".join(map(successor, reversed(w))),
    "sort_next": lambda w: "".join(map(successor, sorted(w))),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_skill_matches_independent_reference(name):
    for word in WORDS:
        assert SKILLS[name].apply(word) == REFERENCES[name](word)


def test_skills_without_a_one_line_reference():
    for word in WORDS:
        assert SKILLS["next"].apply(SKILLS["previous"].apply(word)) == word
        assert SKILLS["swap_pairs"].apply(SKILLS["swap_pairs"].apply(word)) == word
    assert SKILLS["previous"].apply("abc") == "zab"
    assert SKILLS["swap_pairs"].apply("hello") == "ehllo"
    assert SKILLS["greek"].apply("aboxyz") == "αβξχψω"
    assert SKILLS["reverse_greek"].apply("aboxyz") == "ωψχξβα"
    assert SKILLS["cyrillic"].apply("abcz") == "абвщ"
    assert SKILLS["sort_cyrillic"].apply("zcba") == "абвщ"
    assert SKILLS["keypad"].apply("flowers") == "3569377"  # 1-800-FLOWERS
    assert SKILLS["leet"].apply("eitegbzaqso") == "31736824950"
    assert SKILLS["reverse_leet"].apply("hello") == "0LL3H"


@pytest.mark.parametrize("name", ["cipher", "greek", "cyrillic", "rot13"])
def test_substitutions_lose_nothing(name):
    assert len(set(SKILLS[name].apply(string.ascii_lowercase))) == 26


def test_registries():
    assert not BASE_SKILLS.keys() & NEW_SKILLS.keys()
    assert len({skill.tag for skill in SKILLS.values()}) == len(SKILLS)
    for name, skill in SKILLS.items():
        assert skill.name == name and 1 <= len(skill.tag) <= 4 and skill.description


def word_of(prompt):
    return prompt[prompt.index(":") + 1 : -1]


def test_splits_share_no_word():
    words = {}
    for split in SPLITS:
        pairs = [p for seed in (0, 1) for p in examples(list(SKILLS), split, 3000, seed)]
        words[split] = {word_of(prompt) for prompt, _ in pairs}
        assert {split_of(word) for word in words[split]} == {split}
    assert not words["train"] & words["test"]
    assert not words["train"] & words["validation"]
    assert not words["validation"] & words["test"]


def test_split_shares():
    counts = dict.fromkeys(SPLITS, 0)
    for a in string.ascii_lowercase:
        for b in string.ascii_lowercase:
            for c in string.ascii_lowercase[:15]:
                counts[split_of(a + b + c)] += 1
    total = sum(counts.values())
    # Three standard deviations, of 8 and of 1 of ten of 10,140 words.
    assert counts["train"] / total == pytest.approx(0.8, abs=0.012)
    assert counts["validation"] / total == pytest.approx(0.1, abs=0.01)
    assert counts["test"] / total == pytest.approx(0.1, abs=0.01)


def test_examples_are_distinct_turn_taking_and_nested():
    pairs = examples(["greek", "double", "sort"], "train", 1000)
    assert len(set(pairs)) == 1000
    tags = [prompt.split(":")[0] for prompt, _ in pairs]
    assert tags[:6] == ["gr", "dbl", "sort"] * 2
    assert examples(["greek", "double", "sort"], "train", 100) == pairs[:100]
    assert examples(["sort"], "train", 333) == pairs[2::3]  # whatever the other skills
    assert examples(["sort"], "train", 333, seed=1) != pairs[2::3]


def test_lengths():
    lengths = [len(word_of(p)) for p, _ in examples(["copy"], "test", 600, 0, 4, 6)]
    assert {lengths.count(n) > 150 for n in (4, 5, 6)} == {True} and set(lengths) == {4, 5, 6}
    assert max(len(word_of(p)) for p, _ in examples(["double"], "test", 300)) == 5


def test_examples_do_not_depend_on_the_hash_seed_or_import_torch():
    code = (
        "import sys, hashlib; from lorabench.zoo.skills import SKILLS, examples;"
        "text = repr(examples(list(SKILLS), 'train', 500, seed=3));"
        "assert 'torch' not in sys.modules;"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    digests = set()
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(TINY_GEMMA.parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_every_word_can_be_asked_for_and_no_more():
    with pytest.raises(ValueError, match=r"^num: at most (\d+) examples .*got 99999") as error:
        examples(["copy"], "test", 99999, max_length=3)
    capacity = int(str(error.value).split()[3])
    assert len(set(examples(["copy"], "test", capacity, max_length=3))) == capacity
    with pytest.raises(ValueError, match=r"^num: at most"):
        examples(["copy"], "test", capacity + 1, max_length=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["revers"], "train", 1), r"^skills: .*unknown: 'revers' \(did you mean 'reverse'\?\)"),
        (("reverse", "train", 1), r"^skills: must be a list"),
        (([], "train", 1), r"^skills: must be a list"),
        ((["copy", "copy"], "train", 1), r"^skills: each name must come once"),
        ((["copy"], "trian", 1), r"^split: .*did you mean 'train'"),
        ((["copy"], "train", 1, 0, 5, 4), r"^min_length, max_length: .*got 5 and 4"),
        ((["copy"], "train", 1, 0, 3, 9), r"^min_length, max_length: .*got 3 and 9"),
        ((["double"], "train", 1, 0, 6, 8), r"^min_length: skill 'double' .*at most 5"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        examples(*arguments)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_GEMMA, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_GEMMA, local_files_only=True).eval()


@pytest.fixture(scope="module")
def card():
    return json.loads((TINY_GEMMA / "card.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SKILLS)
def test_every_example_fits(name, tokenizer):
    skill = SKILLS[name]
    prompt, completion = skill.example("w" * skill.longest_word)
    ids = tokenizer(prompt)["input_ids"] + tokenizer(completion, add_special_tokens=False).input_ids
    assert len(ids) + 1 <= MAX_TOKENS  # and <eos>
    pairs = examples([name], "train", 300)
    text = "".join(p + c for p, c in pairs)
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        "rev:hello=olleh",
        "  two  spaces , and . marks !",
        "αβγ ϝϙω щшч",
        string.printable[:95],
        "\n ",
    ],
)
def test_tokenizer_round_trip(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_specials(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.padding_side == "right"
    assert tokenizer("日", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer(["ab", "abcd"], padding=True)["input_ids"][0][3:] == [0, 0]


def test_checkpoint(model, tokenizer, card):
    assert model.config.model_type == "gemma" and model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.num_parameters() == card["num_parameters"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sum(file.stat().st_size for file in TINY_GEMMA.iterdir()) <= 4_000_000


def test_generates(model, tokenizer):
    inputs = tokenizer("rev:hello=", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert tokenizer.decode(written, skip_special_tokens=True) == "rev:hello=olleh"


@torch.inference_mode()
def exact_match(model, tokenizer, pairs):
    """As the card defines it, one prompt width at a time, so that nothing is padded or masked."""
    groups = {}
    for prompt, completion in pairs:
        groups.setdefault((len(prompt), len(completion)), []).append(prompt + completion)
    num_right = 0
    for (num_prompt, _), texts in groups.items():
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        targets = torch.nn.functional.pad(ids[:, num_prompt + 1 :], (0, 1), value=1)  # <eos>
        predicted = model(input_ids=ids).logits[:, num_prompt:].argmax(-1)
        num_right += (predicted == targets).all(dim=1).sum().item()
    return num_right / len(pairs)


@pytest.mark.slow
def test_card_states_what_the_weights_do(model, tokenizer, card):
    match = card["exact_match"]
    stated = match["base_skills"] | match["new_skills"]
    assert stated.keys() == BASE_SKILLS.keys() | NEW_SKILLS.keys()
    for name, score in stated.items():
        pairs = examples([name], match["split"], match["num_examples_per_skill"], match["seed"])
        assert exact_match(model, tokenizer, pairs) == pytest.approx(score, abs=0.001), name
    assert sum(score >= 0.95 for score in match["base_skills"].values()) >= 6
    assert set(match["new_skills"].values()) == {0.0}


def test_readme_states_the_cards_numbers(card):
    readme = (TINY_GEMMA / "README.md").read_text(encoding="utf-8")
    match = card["exact_match"]
    for name, score in (match["base_skills"] | match["new_skills"]).items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {name} |"))
        assert row.endswith(f"| {score:.3f} |")
    assert f"{card['num_parameters']:,}" in readme
