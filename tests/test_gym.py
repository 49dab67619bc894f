"""data=gym: its examples and scores are those of reasoning-gym, called directly."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import reasoning_gym
import torch
from conftest import composed, predictions, records, say, scores
from sources import run_python

from lorabench import data, identity
from lorabench import model as base_model
from lorabench.config import ConfigErrors, DataConfig
from lorabench.data import gym
from lorabench.data.templates import SPLITS
from lorabench.evaluate import DEFINITIONS, answers

SUMS = {"chain_sum": {"max_terms": 3, "max_digits": 2}}
TWO = {"leg_counting": {"max_animals": 4}, **SUMS}
# Short enough for the 64 characters of the embedded base.
SHORT = ["data=gym", "data.gym={basic_arithmetic: {max_terms: 2, max_digits: 1}}", "tracker=none"]
SHORT += ["data.max_length=56", "data.num_train=16", "data.num_validation=4", "data.num_test=12"]
SHORT += ["data.answer_examples=9", "data.answer_max_new_tokens=6"]


def config(tasks: dict[str, Any] | None = None, **kwargs: Any) -> DataConfig:
    sizes = {"num_train": 40, "num_validation": 8, "num_test": 12}
    templates = {"prompt": "{question}", "completion": "{answer}"}
    chosen = {"gym": SUMS if tasks is None else tasks, "metric": ["nll", "gym"]}
    return DataConfig(**{"name": "g", "source": "gym", **chosen, **templates, **sizes, **kwargs})


def questions(cfg: DataConfig, split: str) -> list[str]:
    return [item["question"] for _, item in gym.entries(cfg, split)]


# Examples


def test_examples_are_the_librarys() -> None:
    cfg = config(TWO, prompt="Q: {question}", completion=" {answer}.")
    loaded = data.load(cfg)
    for split in SPLITS:
        entries = gym.entries(cfg, split)
        assert len(entries) == getattr(cfg, f"num_{split}")
        for example, (dataset, item) in zip(getattr(loaded, split), entries, strict=True):
            task, place = item["metadata"]["source_dataset"], item["metadata"]["source_index"]
            made = reasoning_gym.create_dataset(task, seed=dataset.seed, size=500, **TWO[task])
            assert made[place] == item
            assert example[:2] == (f"Q: {item['question']}", f" {item['answer']}.")
        tasks = [item["metadata"]["source_dataset"] for _, item in entries]
        assert tasks == ["leg_counting", "chain_sum"] * (len(entries) // 2)  # they take turns


def test_no_question_is_in_two_splits_or_twice_in_one() -> None:
    small = {"chain_sum": {"max_terms": 2, "max_digits": 1}}  # 200 questions
    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for seed in range(3):
        for split in SPLITS:
            asked = questions(config(small, gym_seed=seed), split)
            assert len(set(asked)) == len(asked)
            found[split].update(asked)
    assert not found["train"] & found["validation"]
    assert not found["train"] & found["test"]
    assert not found["validation"] & found["test"]


def test_a_split_depends_on_its_own_size_alone_and_a_longer_one_begins_with_the_shorter() -> None:
    one, more = config(), config(num_test=30, num_train=700)
    gym._stream.cache_clear()
    short = {split: questions(one, split) for split in SPLITS}
    gym._stream.cache_clear()
    assert (
        questions(more, "train")[:40] == short["train"]
    )  # more than one chunk, and in other order
    assert questions(more, "test")[:12] == short["test"]
    assert questions(more, "validation") == short["validation"]


def test_the_hash_follows_what_was_generated() -> None:
    first = data.content_hashes(config())
    assert first == data.content_hashes(config({"chain_sum": {"max_digits": 2, "max_terms": 3}}))
    assert first == data.load(config()).hashes
    for other in (
        config(gym_seed=1), config(prompt="{question} "), config({"chain_sum": {"max_terms": 3}}),
    ):  # fmt: skip
        assert not set(first.values()) & set(data.content_hashes(other).values())
    larger = data.content_hashes(config(num_test=13))
    assert larger == first | {"test": larger["test"]} != first


def test_a_seed_has_an_end_and_says_so_whatever_was_asked_before() -> None:
    small = {"chain_sum": {"max_terms": 2, "max_digits": 1}}  # 2 x 10 x 10 questions
    counts = {}
    for order in (SPLITS, SPLITS[::-1]):
        gym._stream.cache_clear()
        for split in order:
            with pytest.raises(ConfigErrors) as caught:
                gym.entries(config(small, **{f"num_{split}": 500}), split)
            (error,) = caught.value.errors
            assert error.startswith(f"data.num_{split}: must be at most the ")
            counts.setdefault(split, set()).add(int(re.findall(r"\d+", error)[0]))
    assert all(len(found) == 1 for found in counts.values())
    assert sum(found.pop() for found in counts.values()) == 200


SAME = """
import json, time
from lorabench.data import gym
tasks, rounds = gym._tasks(), {}
for name in json.loads(NAMES):
    cls, config = tasks[name]
    dataset = cls(config(seed=7, size=500))
    begun, rounds[name] = time.monotonic(), []
    for i in range(COUNT):
        rounds[name].append([dataset[i]["question"], dataset[i]["answer"]])
        if time.monotonic() > begun + 1:  # some take a second per question
            break
print("\\nMADE", json.dumps(rounds, default=repr))  # some tasks print, too
"""


def made_by_two_processes(names: list[str], count: int) -> list[dict[str, Any]]:
    code = SAME.replace("NAMES", repr(json.dumps(names))).replace("COUNT", str(count))
    both = [run_python(code, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    assert [one.returncode for one in both] == [0, 0], both[0].stderr
    return [json.loads(re.findall(r"^MADE (.*)$", one.stdout, re.M)[0]) for one in both]


@pytest.mark.slow
def test_questions_are_the_same_in_every_process_or_the_task_is_refused() -> None:
    """The list of refused tasks is the installed library's: a new version may change it."""
    names = sorted(set(gym._tasks()) - gym.VARYING)
    assert len(names) > 90
    first, second = made_by_two_processes(names, 60)
    common = {name: min(len(first[name]), len(second[name])) for name in names}
    assert [n for n in names if first[n][: common[n]] != second[n][: common[n]]] == []


# Refusals


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ({"chain_sun": {}}, "data.gym: must name tasks of reasoning-gym {version}; got 'chain_sun' "
         "(did you mean 'chain_sum'?)"),
        ({"xyzzy": {}}, "data.gym: must name tasks of reasoning-gym {version}; got 'xyzzy'; use "),
        ({"chain_sum": {"max_term": 3}}, "data.gym.chain_sum.max_term: no such setting; got "
         "'max_term' (did you mean 'max_terms'?); use one of min_terms, max_terms, min_digits"),
        ({"chain_sum": {"size": 3}}, "data.gym.chain_sum.size: must be left out; got 3; set data."),
        ({"chain_sum": {"seed": 3}}, "data.gym.chain_sum.seed: must be left out; got 3; set data."),
        ({"chain_sum": {"max_terms": "two"}},
         "data.gym.chain_sum.max_terms: must be a whole number; got 'two'"),
        ({"chain_sum": {"max_terms": True}},
         "data.gym.chain_sum.max_terms: must be a whole number; got True"),
        ({"chain_sum": {"min_terms": 9}}, "data.gym.chain_sum: must be settings that reasoning-gym "
         "accepts; got {{'min_terms': 9}}: max_terms must be >= min_terms; correct them"),
        ({"isomorphic_strings": {}}, "data.gym.isomorphic_strings: must be a task whose questions "
         "are the same in every process"),
        ({"composite": {}}, "data.gym: must name tasks of reasoning-gym"),
        ({"rubiks_cube": {}}, "data.gym.rubiks_cube: must be a task with an answer to train on; "),
        ({"countdown": {}}, "data.gym.countdown: must be a task whose scorer only reads what the "),
    ],
)  # fmt: skip
def test_tasks_and_settings_are_refused_in_one_line(tasks: dict[str, Any], expected: str) -> None:
    errors = data.check(config(tasks))
    version = importlib.metadata.version("reasoning-gym")
    assert errors[0].startswith(expected.format(version=version)) and "\n" not in errors[0]
    assert len(errors) == 1


def test_other_keys_are_refused() -> None:
    (error,) = data.check(config(num_test=None))
    assert error.startswith("data.num_test: must be given with data.source=gym")
    (error,) = data.check(config(prompt="{prompt}"))
    assert error.startswith("data.prompt: every column must be one of question, answer (data.sourc")
    train = dataclasses.replace(DataConfig().train, path="x.jsonl")
    assert data.check(config(train=train))[0].startswith("data.train.path: must be left out with")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data=gym"], "data.gym: must be a mapping of tasks to their settings; got None"),
        (
            ["data=gym", "data.gym={chain_sum: 3}"],
            "data.gym.chain_sum: must be a mapping of settin",
        ),
        (["data.metric=[gym]"], "data.metric: must be without gym where data.source is not gym"),
        (["objective=test/gym"], "objective: must be another metric where data.source is not gym"),
        (["data.gym={chain_sum: {}}"], "data.gym: must be null with data.source=skills"),
        ([*SHORT, "data.gym_seed=-1"], "data.gym_seed: must be at least 0; got -1"),
    ],
)
def test_ranges(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        composed(*words)
    assert any(error.startswith(expected) for error in caught.value.errors), caught.value.errors


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "installed", lambda _: None)
    (error,) = data.check(config())
    assert "pip install 'lorabench[gym]'" in error


def test_scorers_that_run_what_a_model_wrote_are_known() -> None:
    """The list is what `grep -E 'eval|parse_expr'` finds in the scorers of 0.1.25, read by eye."""
    found = {name for name, (dataset, _) in gym._tasks().items() if gym._runs_code(dataset)}
    assert found == {
        "binary_matrix", "countdown", "intermediate_integration", "n_queens",
        "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
        "string_insertion",
    }  # fmt: skip
    # What the refusal is for: the library's scorer does run it.
    dataset = reasoning_gym.create_dataset("string_insertion", seed=1, size=1)
    with pytest.raises(SystemExit):
        dataset.score_answer("__import__('sys').exit(3)", dataset[0])


# Scores


class Writes:
    """A pack of one run that writes the texts it is given, prompt by prompt."""

    size, device = 1, "cpu"

    def __init__(self, tokenizer: Any, texts: dict[tuple[int, ...], str]):
        self.tokenizer, self.texts = tokenizer, texts

    def generate(self, ids: torch.Tensor, mask: torch.Tensor, **_: Any) -> torch.Tensor:
        prompts = [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        rows = [self.tokenizer.encode(self.texts[p], add_special_tokens=False) for p in prompts]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        written = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        return torch.cat([ids, written], 1)[None]


WRITTEN = ["{}", " {} ", "{}.0", "+{}", "the answer is {}", "0{}", "nothing", "", "1{}"]


@pytest.mark.parametrize("pattern", [None, r"is (\S+)"])
def test_gym_is_the_librarys_score_of_what_is_written(pattern: str | None) -> None:
    cfg = composed(*SHORT, "trainer.eval_batch_size=4")
    cfg.data.answer_pattern = pattern
    tokenizer = base_model.tokenizer(cfg.model)
    tokens = data.tokenise(data.load(cfg.data).test, tokenizer, cfg.data)
    items = [item for _, item in gym.entries(cfg.data, "test")]
    texts = [form.format(item["answer"]) for form, item in zip(WRITTEN, items[:9], strict=True)]
    prompts = [
        tuple(ids[:start])
        for ids, start in zip(tokens.input_ids, tokens.completion_start, strict=True)
    ]
    pack: Any = Writes(tokenizer, dict(zip(prompts, texts, strict=False)))
    pack.configs = [SimpleNamespace(trainer=cfg.trainer)]
    (table,) = answers(pack, tokens, tokenizer, data.pad_id(tokenizer), cfg.data, [])
    score = reasoning_gym.get_score_answer_fn("basic_arithmetic")
    expected = []
    for text, item in zip(texts, items[:9], strict=True):
        asked = text.strip()
        if pattern:
            asked = text.split(" is ")[1] if " is " in text else None
        expected.append(score(asked, item))
    assert table["gym"].to_pylist() == [*expected, None, None, None]
    assert len(set(expected)) > 1 and (pattern or any(0 < value < 1 for value in expected))


def test_a_scorer_that_fails_gives_0() -> None:
    cfg = config({"prime_factorization": {}})
    score = gym.scorer(cfg)
    (first, *_), ((dataset, item), *_) = data.load(cfg).test, gym.entries(cfg, "test")
    with pytest.raises(ValueError):
        dataset.score_answer("1/0", item)
    assert score(first.id, "1/0") == 0.0
    assert score(first.id, item["answer"]) == 1.0
    assert score(first.id, None) == dataset.score_answer(None, item)


def test_evaluation_ids_name_the_library_and_the_tasks() -> None:
    contents = {"validation": "a", "test": "b"}
    settings = identity.evaluation(composed(*SHORT), contents, DEFINITIONS)
    version = importlib.metadata.version("reasoning-gym")
    tasks = {"basic_arithmetic": {"max_terms": 2, "max_digits": 1}}
    assert settings["gym"] == {"reasoning_gym": version, "tasks": tasks}
    assert settings["definitions"]["gym"] == "gym/1" and settings["answer_splits"] == ["test"]
    both = identity.evaluation(composed(*SHORT, "objective=validation/gym"), contents, DEFINITIONS)
    assert both["answer_splits"] == ["validation", "test"]
    plain = identity.evaluation(composed(*SHORT, "data.metric=[nll]"), contents, DEFINITIONS)
    assert "gym" not in plain


def test_a_sweep_from_the_command_line(tmp_path: Path) -> None:
    words = [
        *SHORT,
        "trainer.steps=2",
        "trainer.batch_size=2",
        "lora.r=2",
        f"output_dir={tmp_path}",
    ]
    said = say("train", "-m", *words, "head=exclude,lora", "objective=validation/gym")
    assert said.code == 0, said.err
    cfg = composed(*SHORT).data
    by_id = dict(
        zip([one.id for one in data.load(cfg).test], gym.entries(cfg, "test"), strict=True)
    )
    for folder in (tmp_path / "default" / run for run in records(tmp_path)):
        found = scores(json.loads((folder / "record.json").read_text()))["test"]["gym"]
        table = pd.read_parquet(predictions(folder)).query("split == 'test'").iloc[:9]
        score = reasoning_gym.get_score_answer_fn("basic_arithmetic")
        expected = [
            score(text.strip(), by_id[id].item)
            for id, text in zip(table.example, table.generated, strict=True)
        ]
        assert table.gym.tolist() == expected
        assert found["value"] == pytest.approx(sum(expected) / 9) and found["num_examples"] == 9
    compared = say("compare", tmp_path / "default", "--metric", "gym", "--json")
    assert compared.code == 0 and json.loads(compared.out)["metric"] == "gym"
