"""Many examples: several processes, a cache on disk, a file in place of memory; and long ones."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import composed, say

from lorabench import cache, data, plan, sweep
from lorabench.config import ConfigErrors, DataConfig, SourceConfig
from lorabench.data import encoding, token_cache
from lorabench.data.examples import Collector, Example
from lorabench.worker import Shared
from lorabench.zoo import TINY_GEMMA


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_GEMMA)


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"name": "t", "source": "jsonl", "max_length": 64, **changes})


def made(count: int, seed: int = 0) -> list[Example]:
    """Examples of random letters, of very different lengths; some too long, some without an end."""
    draw = random.Random(seed)

    def word(most: int) -> str:
        return "".join(draw.choices("abcdefgh", k=draw.randint(0, most)))

    return [Example(f"a{word(70)}", word(20), f"{i:016x}") for i in range(count)]


def same(a: data.Tokens, b: data.Tokens) -> None:
    assert a.input_ids == b.input_ids and a.spans == b.spans
    assert (a.ids, a.indices, a.label_ids) == (b.ids, b.indices, b.label_ids)
    assert a.all_lengths.tolist() == b.all_lengths.tolist()
    for name in ("num_too_long", "num_cut", "num_empty", "num_examples", "num_losing_text"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.hash() == b.hash() and a.first_loss == b.first_loss and a.labels == b.labels


def plainly(tokenizer: Any, examples: Sequence[Example]) -> list[list[int]]:
    """What the tokenizer itself gives for each example that fits and is not empty."""
    found = []
    for one in examples:
        completion = tokenizer(one.completion, add_special_tokens=False)["input_ids"]
        ids = [*tokenizer(one.prompt)["input_ids"], *completion, tokenizer.eos_token_id]
        if completion and len(ids) <= 64:
            found.append(ids)
    return found


def test_several_processes_give_what_the_tokenizer_gives(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts come back in order, with all counts."""
    examples = made(700)
    alone = data.tokenise(examples, tokenizer, config())
    monkeypatch.setattr(encoding, "PARALLEL", 100)
    monkeypatch.setattr(encoding, "PART", 90)
    monkeypatch.setattr(cache, "SPILL_BYTES", 500)  # in a file, too
    shared = data.tokenise(examples, tokenizer, config())
    assert list(shared.input_ids) == plainly(tokenizer, examples)
    assert shared.num_too_long > 20 and shared.num_empty > 5
    same(alone, shared)


def test_a_mistake_in_another_process_is_told(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "PARALLEL", 10)
    monkeypatch.setattr(encoding, "PART", 10)
    examples = [*made(25), Example("", "b", "1")]
    with pytest.raises(ConfigErrors, match=r"data\.prompt: must give at least one token"):
        data.tokenise(examples, tokenizer, config(add_bos=False))


# --- the cache -------------------------------------------------------------------------------


@pytest.fixture
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "SMALLEST", 10)
    return tmp_path / "cache"


def test_tokens_are_made_once(
    tokenizer: Any, small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = made(50)
    first = data.tokenise_once(examples, tokenizer, config(), "content", "tokenizer")
    same(first, data.tokenise(examples, tokenizer, config()))
    with monkeypatch.context() as patched:
        patched.setattr(encoding, "tokenise", None)  # whoever calls it fails
        same(data.tokenise_once(examples, tokenizer, config(), "content", "tokenizer"), first)
    (folder,) = (small_cache / "tokens").iterdir()
    assert {file.name for file in folder.iterdir()} == {"input_ids.i4", "rest.npz", "about.json"}


@pytest.mark.parametrize(
    "other",
    [
        {"content": "another"},
        {"tokenizer_hash": "another"},
        {"cfg": config(max_length=40)},
        {"cfg": config(add_eos=False)},
        {"cfg": config(too_long="cut_prompt")},
        {"cfg": config(chat_template="chatml")},
        {"stops": [3]},
    ],
    ids=lambda other: "-".join(other),
)
def test_what_decides_the_tokens_is_in_their_key(other: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"cfg": config(), "content": "c", "tokenizer": "t", "stops": []}
    changed = asked | {key.removesuffix("_hash"): value for key, value in other.items()}
    assert token_cache.key_of(**asked, labels=[]) != token_cache.key_of(**changed, labels=[])


def test_the_commit_of_a_hub_base_is_in_the_key(
    tokenizer: Any, small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no hash of tokenizer files: two bases would get each other's tokens."""
    monkeypatch.setattr(Shared, "tokenizer", lambda *_: tokenizer)
    planner = plan.Planner()
    for commit in ("a" * 40, "b" * 40):
        job = sweep.Job(config := composed("data.num_train=16"), "", planner.make(config))
        hub = {"hub": "some/base", "revision": commit, "tokenizer": ""}
        job.plan = job.plan.model_copy(update={"contents": job.plan.contents | hub})
        Shared(planner).dataset(job)
    assert len(list((small_cache / "tokens").iterdir())) == 6  # three splits of each base


@pytest.mark.parametrize("file", ["input_ids.i4", "rest.npz", "about.json"])
@pytest.mark.parametrize("damage", ["changed", "cut short", "gone"])
def test_damaged_tokens_are_made_again(
    file: str, damage: str, tokenizer: Any, small_cache: Path
) -> None:
    examples = made(50)
    first = data.tokenise_once(examples, tokenizer, config(), "content", "tokenizer")
    (folder,) = (small_cache / "tokens").iterdir()
    content = (folder / file).read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        (folder / file).unlink()
    elif damage == "cut short":
        (folder / file).write_bytes(content[:middle])
    else:
        (folder / file).write_bytes(
            content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        )
    same(data.tokenise_once(examples, tokenizer, config(), "content", "tokenizer"), first)


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(token_cache, "SMALLEST", 10)
    monkeypatch.setattr(cache, "SPILL_BYTES", 500)
    examples = made(50)
    found = data.tokenise_once(examples, tokenizer, config(), "content", "tokenizer")
    assert list(found.input_ids) == plainly(tokenizer, examples)


def test_labels_are_kept_too(tokenizer: Any, small_cache: Path) -> None:
    examples = [Example(f"a{'b' * i}", "xy"[i % 2], f"{i:016x}") for i in range(30)]
    labels = ["x", "y"]
    first = data.tokenise_once(examples, tokenizer, config(), "c", "t", labels=labels)
    again = data.tokenise_once(examples, tokenizer, config(), "c", "t", labels=labels)
    assert again.label_ids == [i % 2 for i in range(30)] and again.labels == labels
    same(first, again)


def test_the_least_recently_used_go_first(
    tokenizer: Any, small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "SETS", 2)
    examples = made(20)
    for content in ("a", "b", "c"):
        data.tokenise_once(examples, tokenizer, config(), content, "t")
    kept = {folder.name for folder in (small_cache / "tokens").iterdir()}
    assert len(kept) == 2
    assert token_cache.key_of(config(), "c", "t", (), []) in kept


# --- rows in Arrow ---------------------------------------------------------------------------


@pytest.mark.parametrize("spill", [1, 1 << 20], ids=["on disk", "in memory"])
def test_rows_come_back_as_they_went(spill: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SPILL_BYTES", spill)
    rows = [(f"p{i}\n\0é", "c" * (i % 7), "", "s") for i in range(9000)]
    collector = Collector()
    for row in rows:
        collector.add(*row)
    table = collector.table()
    assert [tuple(row.values()) for row in table.to_pylist()] == rows


def test_repeated_examples_keep_their_ids(tmp_path: Path) -> None:
    """The nth repetition has an id of its own, whatever stands between."""
    rows = [{"prompt": p, "completion": "c"} for p in ["x", "y", "x", "z", "x", "y"]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = SourceConfig(path=str(path))
    found = data.load(config(train=other, validation=other, test=other)).train
    assert len(found) == 6 and len({one.id for one in found}) == 6
    once = data.load(config(train=other, validation=other, test=other)).test
    assert [one.id for one in found] == [one.id for one in once]


# --- long examples ---------------------------------------------------------------------------


def test_cut_prompt_keeps_bos_and_the_completion(tokenizer: Any) -> None:
    """What is left ends as the whole does, and no completion loses a token."""
    examples = [Example("a" + "bcdefgh" * 10, "fed", "0"), Example("ab", "c", "1")]
    examples.append(Example("a", "b" * 90, "2"))  # its completion alone is too long
    whole = data.tokenise(examples, tokenizer, config(max_length=500))
    found = data.tokenise(examples, tokenizer, config(max_length=20, too_long="cut_prompt"))
    assert found.num_cut == 1 and found.num_too_long == 1 and found.ids == ["0", "1"]
    cut, full = found.input_ids[0], whole.input_ids[0]
    assert len(cut) == 20 and cut[0] == tokenizer.bos_token_id and cut[1:] == full[-19:]
    assert cut[slice(*found.spans[0])] == full[slice(*whole.spans[0])]
    (note,) = [one for one in found.notes("train", config(max_length=20)) if "is cut" in one]
    assert note.startswith("data.train: the left of the prompt is cut from 1 of 3 examples")


@pytest.mark.parametrize("length", [2, 7, 64])
def test_every_token_of_a_text_carries_the_loss_once(length: int, tokenizer: Any) -> None:
    """In pieces that overlap by the token that the first of them is predicted from."""
    texts = ["abcdefgh" * 5, "a", "hgf" * 13]
    examples = [Example("", text, str(i)) for i, text in enumerate(texts)]
    found = data.tokenise(examples, tokenizer, config(format="text", max_length=length))
    trained: dict[str, list[int]] = {}
    for id, ids, (begin, end) in zip(found.ids, found.input_ids, found.spans, strict=True):
        assert begin == 1 and end == len(ids) <= length
        trained.setdefault(id.partition(".")[0], []).extend(ids[begin:end])
    for i, text in enumerate(texts):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert trained[str(i)] == [*expected, tokenizer.eos_token_id]
    assert len(set(found.ids)) == len(found.ids)


# --- through the command line ----------------------------------------------------------------


def write(path: Path, lengths: Sequence[int]) -> str:
    rows = [
        {"prompt": f"{chr(97 + i % 26)}{chr(97 + i // 26)}=", "completion": "b" * length}
        for i, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WORDS = ["plan", "tracker=none", "data=jsonl", "data.max_length=20", "data.num_test=10"]


@pytest.mark.slow
def test_too_many_left_out_are_refused(tmp_path: Path) -> None:
    """With the length that keeps 99%, and a share that lets the same command through."""
    path = write(tmp_path / "a.jsonl", [5] * 90 + [30] * 10)
    words = [*WORDS, f"data.train.path={path}", "data.test_fraction=0.3"]
    refused = say(*words)
    assert refused.code == 2
    (line,) = [line for line in refused.err.splitlines() if "data.train through" in line]
    assert "got 20, and" in line and "data.max_length=35 keeps 99%" in line
    share = line.rpartition("data.allow_left_out=")[2].split()[0]
    assert 0.05 < float(share) < 0.2
    assert say(*words, "data.allow_left_out=0.3").code == 0
    assert say(*words, "data.max_length=35").code == 0


def test_show_prints_what_is_trained(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", range(1, 15))
    words = [*WORDS, f"data.train.path={path}", "--show", "2"]
    shown = json.loads(say(*words, "--json").out)
    first = shown["examples"][0]
    (text,) = [one for one in data.load(config(train=SourceConfig(path=path))).train][:1]
    assert first["parts"] == [
        [f"<bos>{text.prompt}", False],
        [f"{text.completion}<eos>", True],
    ]
    ids = tokenizer(text.prompt + text.completion)["input_ids"]
    assert first["tokens"] == len(ids) + 1 and first["loss_tokens"] == len(text.completion) + 1
    lengths = sorted(len(tokenizer(one.prompt + one.completion)["input_ids"]) + 1 for one in
                     data.load(config(train=SourceConfig(path=path))).train)  # fmt: skip
    assert shown["lengths"]["train"]["50%"] == int(np.quantile(lengths, 0.5, method="higher"))
    assert shown["lengths"]["train"]["longest"] == lengths[-1]
    out = say(*words).out
    assert f"<bos>{text.prompt}⟦{text.completion}<eos>⟧" in out
    assert "lengths   data.test: 1% " in out


def test_show_wants_a_number() -> None:
    refused = say("plan", "tracker=none", "--show", "0")
    assert refused.code == 2 and "must be a whole number from 1 on; got '0'" in refused.err
