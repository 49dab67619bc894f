"""Chat data through the command line: planned, trained, refused, recorded, exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stock
from chats import CHATML, MISTRAL, of_trl, says, tokenizer
from conftest import composed, say
from equality import compare_training
from tiny import tiny_config

from lorabench import model as base_model
from lorabench.config import ModelConfig
from lorabench.data import chat

LETTERS = "abcdefghijklmnopqrst"
ROWS = [
    {"messages": says(f"say {one}{two}", f"{one} {two}", "again", f"{two} {one}")}
    for one in LETTERS
    for two in LETTERS[:4]
]
SHORT = [
    "model=local", "data=jsonl", "data.format=messages", "data.max_length=96", "trainer=smoke",
    "trainer.num_threads=1", "tracker=none", "lora.r=2", "trainer.steps=2", "data.num_test=4",
    "data.num_validation=4", "trainer.eval_base=false", "data.metric=[nll]",
    "objective=validation/nll",
]  # fmt: skip


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str | None], Path]:
    """Makes a checkpoint folder of a tiny random model with a family's tokenizer and a template."""

    def make(family: str, template: str | None) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        folder = tmp_path_factory.mktemp("chats") / family
        torch.manual_seed(0)
        config = tiny_config("llama", len(tokenizer(family)))
        config.bos_token_id, config.eos_token_id = 0, 1
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        tokenizer(family, template).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def chatml(chat_folder: Any) -> Path:
    return chat_folder("chatml", CHATML)


@pytest.fixture
def typed(
    chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """The words of a command on rows of messages, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def words(*more: str, rows: Any = ROWS, model: Path = chatml) -> list[str]:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path("chat.jsonl").write_text(text, encoding="utf-8")
        return [*SHORT, f"model.path={model}", "data.train.path=chat.jsonl", *more]

    return words


def planned(*words: str) -> dict[str, Any]:
    said = say("plan", "--json", *words)
    assert said.code == 0, said.err
    (run,) = json.loads(said.out)["runs"]
    return run


def refused(*words: str) -> str:
    said = say("plan", *words)
    assert said.code == 2, said.out
    (line,) = said.lines
    return line


def recorded(folder: str = "outputs") -> tuple[Path, dict[str, Any]]:
    (path,) = Path(folder).glob("*/*/record.json")
    return path.parent, json.loads(path.read_text())


def test_it_trains_and_the_template_goes_with_it(typed: Any) -> None:
    words = typed("data.chat_template=mine.jinja")
    Path("mine.jinja").write_text(CHATML.replace("{% endfor %}", "{# mine #}{% endfor %}"))
    text = Path("mine.jinja").read_text()
    said = say("train", *words)
    assert said.code == 0, said.err
    folder, entry = recorded()
    assert entry["status"] == "finished"
    saved = folder / "adapter" / "chat_template.jinja"
    assert saved.read_text() == text and "adapter/chat_template.jinja" in entry["files"]
    assert entry["provenance"]["chat_template"] == chat.text_hash(text)
    Path("mine.jinja").write_text(CHATML)
    said = say("evaluate", str(folder), "data.metric=[nll,exact_match]")
    assert said.code == 2 and "must be the template that run" in said.lines[0]
    Path("mine.jinja").unlink()  # what was saved serves from here on
    said = say("generate", str(folder), "--prompt", "say ab", "--max-new-tokens", "3")
    assert said.code == 0, said.err
    for kind in ("merged", "adapter"):
        said = say("export", str(folder), "--to", kind, kind)
        assert said.code == 0, said.err
        assert Path(kind, "chat_template.jinja").read_text() == text
    report = json.loads(Path("merged", "export.json").read_text())
    assert "no test example" not in report["checks"]["on"]


@pytest.mark.slow
def test_the_run_id_follows_the_text_of_a_template(typed: Any) -> None:
    words = typed()
    Path("one.jinja").write_text(CHATML)
    Path("two.jinja").write_text(CHATML)
    one, two = (planned(*words, f"data.chat_template={x}.jinja")["run_id"] for x in ("one", "two"))
    assert one == two
    Path("two.jinja").write_text(CHATML + "{# other #}")
    assert planned(*words, "data.chat_template=two.jinja")["run_id"] != one
    # Conversations take the tokenizer's own template, said or not.
    own = planned(*words)["run_id"]
    assert planned(*words, "data.chat_template=true")["run_id"] == own != one
    kwargs = "data.chat_template_kwargs={enable_thinking: false}"
    assert planned(*words, kwargs)["run_id"] != own
    assert planned(*words, "data.loss_on=last")["run_id"] != own


@pytest.mark.slow
def test_sharegpt_is_the_same_as_messages(typed: Any) -> None:
    names = {"user": "human", "assistant": "gpt"}
    rows = [
        {"conversations": [
            {"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]
        ]}
        for row in ROWS
    ]  # fmt: skip
    one = planned(*typed())
    two = planned(*typed("data.format=sharegpt", rows=rows))
    assert one["lengths"] == two["lengths"] and one["lengths"] is not None


def test_stops_come_from_generation_config(chat_folder: Any, typed: Any) -> None:
    """GLM's turns end with the beginning of the next one, which only that file tells."""
    from transformers import AutoConfig, GenerationConfig

    folder = chat_folder("glm", of_trl("glm4moe"))
    line = refused(*typed(model=folder))
    assert "a turn must end with a special token, or the model never learns to stop" in line
    found = tokenizer("glm")
    stops = [found.convert_tokens_to_ids(one) for one in ("<|endoftext|>", "<|user|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    plan = planned(*typed(model=folder))
    assert json.loads(plan["contents"]["stops"]) == stops
    where = ModelConfig(path=str(folder))
    assert base_model.stops(where) == GenerationConfig.from_pretrained(folder).eos_token_id
    (folder / "generation_config.json").unlink()
    config = AutoConfig.from_pretrained(folder)
    assert base_model.stops(where) == [GenerationConfig.from_model_config(config).eos_token_id]


REFUSED = [  # words, rows, the template of the model, what the line says
    ([], [{"text": "x"}], CHATML, "data.messages: every column must be one of text"),
    ([], [{"messages": [{"role": "narrator", "content": "x"}]}], CHATML, "has the role 'narrator'"),
    (
        ["data.format=sharegpt", "data.messages=messages"], ROWS, CHATML,
        "OpenAI's form: set data.format=messages",
    ),
    ([], [{"messages": says("x")}], CHATML, "at least one example with a completion"),
    ([], ROWS, None, "give a template (chatml, gemma, llama3, qwen, or a file)"),
    (["data.chat_template=chatlm"], ROWS, CHATML, "did you mean 'chatml'?"),
    (["data.chat_template=."], ROWS, CHATML, "'.': Is a directory"),
    (["data.chat_template=gemma"], ROWS, CHATML, "ends them with <end_of_turn>"),
    (
        ["data.chat_template_kwargs={tools: []}"], ROWS, CHATML,
        "names that the template does not get anyway; got 'tools'",
    ),
    (["data.prompt=x"], ROWS, CHATML, "data.prompt: must be left out with data.format=messages"),
    (["data.loss_on=first"], ROWS, CHATML, "data.loss_on: must be one of"),
    (["data.system=keep"], ROWS, CHATML, "data.system: must be one of"),
    (
        [], ROWS, "{{ raise_exception('a system message must come first') }}",
        "a system message must come first; correct the template",
    ),
    (
        [], ROWS, MISTRAL.replace("+ eos_token", ""),
        "must end with a special token, or the model never learns to stop",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("words", "rows", "template", "says_so"), REFUSED)
def test_what_is_refused_says_why_in_one_line(
    words: list[str],
    rows: Any,
    template: str | None,
    says_so: str,
    typed: Any,
    chatml: Path,
    tmp_path: Path,
) -> None:
    folder = chatml
    if template != CHATML:
        folder = tmp_path / "model"
        shutil.copytree(chatml, folder)
        (folder / "chat_template.jinja").unlink()
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
    assert says_so in refused(*typed(*words, rows=rows, model=folder))


@pytest.mark.usefixtures("float64_inside")
def test_a_pack_on_messages_equals_stock_peft(
    typed: Any, chatml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one pack; the labels of several turns are what stock PEFT's loss sees."""
    monkeypatch.setattr(stock, "embedded_tokenizer", lambda: tokenizer("chatml", CHATML))
    words = typed("model.dtype=float64", "trainer.steps=4", "trainer.batch_size=3")
    configs = [
        composed(*words, f"lora.r={r}", f"head={head}", f"seeds.init={r}", "trainer.lr=1e-2")
        for r, head in ((2, "exclude"), (4, "lora"))
    ]
    tokens, _ = stock.tokens_of(configs[0])
    assert set(tokens.spans.lengths) == {4}, "two turns of each example carry a loss"
    loss, (weights, name) = compare_training(configs)
    # Float64 rounding (1e-16) of sums in another order, grown by 4 AdamW steps.
    assert loss < 1e-11
    assert weights < 1e-10, name
