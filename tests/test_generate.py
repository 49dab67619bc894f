"""`lorabench generate` writes what stock PEFT and transformers write with the saved adapters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from conftest import SHORT_RUN, Said, composed, records, say
from exports import base_of, loaded, stock
from safetensors.torch import load_file, save_file

from lorabench import generation
from lorabench.config import ConfigErrors

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["add 3 and 4 = ", "b", "what is this?"]
TEXT = ["generate", "--max-new-tokens", "12", *(w for p in PROMPTS for w in ("--prompt", p))]
MIXED = ["lora.use_dora=false,true", "seed=0,1"]  # DoRA does not pack


def train(out: Path, base: Path, jsonl: Path, *overrides: str) -> Path:
    """Train a sweep on a tiny base and return its folder."""
    size = ["data=jsonl", f"data.train.path={jsonl}", "data.num_train=40", "data.max_length=64"]
    words = [*SHORT_RUN, "trainer.steps=4", *size, "model=local", f"model.path={base}"]
    said = say("train", "-m", *words, f"output_dir={out}", *overrides)
    assert said.code == 0, said.err
    return out / "default"


@pytest.fixture(scope="module")
def base(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of this file's own, whose tokenizer has a chat template."""
    place = tmp_path_factory.mktemp("bases") / "llama"
    shutil.copytree(tiny_folder("llama"), place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"add {i} and 1 = ", "completion": str(i + 1)} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def mixed(base: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("mixed"), base, file, *MIXED)


@pytest.fixture(scope="module")
def chats(base: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chats")
    return train(out, base, file, "data.chat_template=true", "head=exclude,lora")


def told(said: Said) -> dict[str, Any]:
    assert said.code == 0 and said.err == "", said
    return json.loads(said.out)["prompts"]


def ends(base: Path) -> set[int]:
    """What ends an answer: the tokenizer's EOS and the base's own, which chat models have."""
    theirs = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    return {transformers.AutoTokenizer.from_pretrained(base).eos_token_id, theirs}


def by_stock(model: Any, base: Path, prompt: str, chat: bool = False) -> str:
    """What transformers' generate() writes after a prompt alone, padded with nothing."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    if chat:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=12, eos_token_id=[*ends(base)], pad_token_id=0
    )
    written = model.generate(**ids, generation_config=settings)
    return tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def compare_with_stock(found: list[dict[str, Any]], base: Path, chat: bool = False) -> None:
    """Texts must be equal: both take the largest logit, and no two come within rounding here."""
    models = {
        one["folder"]: stock(Path(one["folder"])) if one["folder"] else loaded(base)
        for one in found[0]["answers"]
    }
    for one in found:
        for answer in one["answers"]:
            model = models[answer["folder"]]
            assert answer["text"] == by_stock(model, base, one["prompt"], chat)
    texts = {answer["text"] for one in found for answer in one["answers"]}
    assert len(texts) > len(found)  # the adapters do something


def test_packed_and_alone_adapters_write_what_stock_peft_writes(mixed: Path, base: Path) -> None:
    found = told(say(*TEXT, mixed, "--all-seeds", "--json"))
    assert [one["prompt"] for one in found] == PROMPTS
    plans = {run: one["plan"]["alone"] for run, one in records(mixed.parent).items()}
    assert sorted(why is None for why in plans.values()) == [False, False, True, True]
    for one in found:
        assert one["answers"][0]["run_id"] is None
        assert {answer["run_id"] for answer in one["answers"][1:]} == set(plans)
    compare_with_stock(found, base)
    assert len(ends(base)) == 2
    # Fails where only the tokenizer's EOS ends an answer: some would go on for 12 tokens.
    assert {answer["ended"] for one in found for answer in one["answers"]} == {"eos", "length"}


def test_a_prompt_is_the_users_turn_of_a_chat(chats: Path, base: Path) -> None:
    found = told(say(*TEXT, chats, "--json"))
    compare_with_stock(found, base, chat=True)


def test_the_adapters_of_a_base_write_in_one_pack(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where the base is loaded, or gone through, once per adapter."""
    loads, packs = [], []
    load, answers = generation.base_model.load_verified, generation._answers
    monkeypatch.setattr(
        generation.base_model, "load_verified", lambda *a: (loads.append(1), load(*a))[1]
    )
    monkeypatch.setattr(
        generation, "_answers", lambda g, pack, n: (packs.append(pack.size), answers(g, pack, n))[1]
    )
    told(say(*TEXT, mixed, "--all-seeds", "--json"))
    assert len(loads) == 1 and packs == [1, 2, 1, 1]  # the base, a pack, two with DoRA


def test_one_seed_per_setting_unless_all_are_asked_for(mixed: Path) -> None:
    (found,) = told(say("generate", mixed, "--prompt", "b", "--max-new-tokens", 2, "--json"))
    shown = [(one["seed"], one["setting"]) for one in found["answers"][1:]]
    assert shown == [(0, {"lora.use_dora": False}), (0, {"lora.use_dora": True})]
    second = next(r for r, one in records(mixed.parent).items() if one["seeds"]["init"] == 1)
    (found,) = told(say("generate", mixed / second[:8], "--prompt", "b", "--json"))
    assert [one["run_id"] for one in found["answers"]] == [None, second]


def test_an_answer_ends_before_a_stop(mixed: Path, tmp_path: Path) -> None:
    run = next(iter(records(mixed.parent)))
    copied = tmp_path / "sweep" / run
    shutil.copytree(mixed / run, copied)
    ask = ["generate", copied, "--prompt", PROMPTS[0], "--max-new-tokens", 12, "--json"]
    (found,) = told(say(*ask))
    content = json.loads((copied / "record.json").read_text())
    del content["checksum"]
    whole = found["answers"][0]["text"]
    content["config"]["data"]["answer_stop"] = ["no such text", whole[3:5]]
    (copied / "record.json").write_text(json.dumps(content))
    (found,) = told(say(*ask))
    stopped = found["answers"][0]
    assert stopped["ended"] == "stop" and stopped["text"] == whole.partition(whole[3:5])[0] != ""


def test_short_memory_takes_smaller_batches_then_smaller_packs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[tuple[int, int]] = []

    def small(_: Any, pack: list[str], batch_size: int) -> list[list[str]]:
        tried.append((len(pack), batch_size))
        if len(pack) * batch_size > most:
            raise MemoryError
        return [[run] for run in pack]

    monkeypatch.setattr(generation, "_answers", small)
    monkeypatch.setattr(generation, "gc", SimpleNamespace(collect=int))  # slow, and nothing is held
    run: Any = SimpleNamespace(config=composed())
    group = generation.Group([run], prompts=[[1]] * 7)
    most = 2
    runs: Any = list("abcde")
    assert generation._in_packs(group, runs, list) == [[one] for one in "abcde"]
    assert tried[:4] == [(5, 32), (5, 4), (5, 2), (5, 1)] and tried[-1] == (2, 1)
    most = 0
    with pytest.raises(ConfigErrors, match=r"trainer\.device: must have memory for"):
        generation._in_packs(group, runs, list)


def test_a_damaged_adapter_is_left_out_and_named(mixed: Path, tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    shutil.copytree(mixed, place)
    run = next(r for r, one in records(tmp_path).items() if one["seeds"]["init"] == 0)
    weights = place / run / "adapter" / "adapter_model.safetensors"
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights)
    said = say("generate", place, "--prompt", "b", "--max-new-tokens", 2)
    assert said.code == 1 and said.out.count("seed=0") == 1
    assert said.lines[-1].startswith(f"adapter: must be the one that run {run} trained, ")
    assert f"remove '{place / run}' and repeat" in said.lines[-1]
    said = say("generate", place, "--prompt", "b", "--max-new-tokens", 2, "--json")
    assert said.code == 1 and set(json.loads(said.out)["damaged"]) == {run}


def test_runs_on_another_base_follow_with_their_own(
    mixed: Path, trained: Callable[..., Path]
) -> None:
    run = trained("gemma", "head=lora")
    ask = ["--prompt", "b", "--max-new-tokens", 12, "--json"]
    (found,) = told(say("generate", mixed, run, *ask))
    rows = [(one["model"], one["run_id"]) for one in found["answers"]]
    assert sorted(name for name, _ in rows) == ["gemma"] * 2 + ["llama"] * 3
    for name in ("gemma", "llama"):  # each base stands before its runs
        ids = [id for of, id in rows if of == name]
        assert ids[0] is None and None not in ids[1:]
    texts = {one["folder"]: one["text"] for one in found["answers"]}
    assert texts[str(run)] == by_stock(stock(run), Path(base_of(run)), "b")


# --- files of prompts ------------------------------------------------------------------------


def test_prompts_come_from_files_too(mixed: Path, tmp_path: Path) -> None:
    plain, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_bytes(b"\xef\xbb\xbfadd 1\r\n\r\nadd 2\r\n")
    rows.write_text('{"prompt": "two\\nlines", "id": 3}\n\n{"prompt": "b"}\n')
    short = ["--max-new-tokens", 2, "--json"]
    found = told(say("generate", mixed, "--prompt", "a", "--file", plain, *short))
    assert [one["prompt"] for one in found] == ["a", "add 1", "add 2"]
    found = told(say("generate", mixed, "--file", rows, *short))
    assert [one["prompt"] for one in found] == ["two\nlines", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "--file: must hold prompts; '{path}' has none; write one per line"),
        ("a.txt", b"a\n\xff\n", "--file: must be UTF-8; '{path}' is not, at byte 2; convert it"),
        ("a.jsonl", b'{"prompt": "a"}\n"b"\n', "--file: every line must be an object such as "),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "--file: every line must be an object such as "),
        ("a.jsonl", b'{"prompt": 3}\n', "--file: every line must be an object such as "),
        ("a.txt", None, "--file: must be a file of prompts; '{path}': No such file or directory"),
    ],
)
def test_a_file_that_holds_no_prompts(
    name: str, content: bytes | None, message: str, tmp_path: Path, no_model: None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    said = say("generate", tmp_path, "--file", path)
    assert said.code == 2 and said.err.startswith(message.format(path=path))


# --- refusals --------------------------------------------------------------------------------


def refused(*words: Any) -> str:
    said = say("generate", *words)
    assert said.code == 2 and said.out == "" and len(said.lines) == 1, said
    return said.lines[0]


def test_what_cannot_be_asked(mixed: Path, trained: Callable[..., Path], tmp_path: Path) -> None:
    ask = [mixed, "--prompt", "b"]
    assert refused(mixed).startswith("--prompt: must give something to answer")
    assert refused(*ask, "--max-new-tokens", 0).startswith("--max-new-tokens: must be at least 1")
    line = refused(*ask, "--max-new-tokens", 500)
    assert re.fullmatch(
        "--max-new-tokens: prompt and answer must fit the 128 positions of base model 'llama'; got "
        "500 after a prompt of 2 tokens; set --max-new-tokens=126 or less",
        line,
    )
    line = refused(mixed, "--prompt", "b" * 200)
    assert line.endswith("after a prompt of 201 tokens; shorten it")
    assert refused(*ask, "--device", "cuda:99").startswith("trainer.device: must be on this mac")
    line = refused(tmp_path / "no", *ask)
    assert line.startswith("DIR: must hold a run with a saved adapter; ") and "not exist" in line
    line = refused(tmp_path, "--prompt", "b")
    assert line.endswith("has no run; `lorabench train` makes them")


def test_runs_that_have_no_answer(mixed: Path, tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    shutil.copytree(mixed, place)
    for path in place.glob("*/record.json"):
        content = json.loads(path.read_text())
        del content["checksum"]
        path.write_text(json.dumps(content | {"status": "failed"}))
    assert "has failed runs; " in refused(place, "--prompt", "b")
    for i, path in enumerate(sorted(place.glob("*/record.json"))):
        content = json.loads(path.read_text())
        if i == 0:
            path.write_text(json.dumps(content | {"status": "finished"}))
            continue
        content["config"] |= {"task": "seq_cls", "head": {"policy": "full"}}
        content["config"]["data"]["metric"] = ["nll"]
        path.write_text(json.dumps(content | {"status": "finished"}))
    said = say("generate", place, "--prompt", "b", "--max-new-tokens", 2)
    assert said.code == 0 and said.lines[0].startswith("left out, for they classify: ")
    line = refused(path.parent, "--prompt", "b")
    assert line.startswith(f"task: must be causal_lm to write text; {path.parent.name} classify; ")


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_another_base_than_the_runs_had(mixed: Path, base: Path, part: str) -> None:
    path = base / ("model.safetensors" if part == "weights" else "tokenizer_config.json")
    before = path.read_bytes()
    try:
        if part == "weights":
            tensors = {name: t + 1 for name, t in load_file(path).items()}
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            path.write_text(json.dumps(json.loads(before) | {"chat_template": "{{ 1 }}"}))
        said = say("generate", mixed, "--prompt", "b")
    finally:
        path.write_bytes(before)
    assert said.code == 2 and len(said.lines) == 1
    assert said.lines[0].startswith("model.path: must be the base run ") and part in said.lines[0]


# --- what is shown ---------------------------------------------------------------------------


def test_the_shape_of_the_training_prompts_is_told(mixed: Path, tmp_path: Path) -> None:
    run = next(iter(records(mixed.parent)))
    copied = tmp_path / "sweep" / run
    shutil.copytree(mixed / run, copied)
    ask = ["generate", copied, "--prompt", "b", "--max-new-tokens", 2]
    assert say(*ask).err == ""
    content = json.loads((copied / "record.json").read_text())
    del content["checksum"]
    content["config"]["data"]["prompt"] = "Q: {prompt}"
    (copied / "record.json").write_text(json.dumps(content))
    said = say(*ask)
    assert said.code == 0 and said.lines == [
        "note: the runs were trained on prompts of the form 'Q: {prompt}'; --prompt is the whole "
        "prompt"
    ]
    assert "[cut after 2 tokens]" in said.out
