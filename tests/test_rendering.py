"""Chat templates that refuse, fail, never end or take all memory: one line, and soon.

What rendered templates give is compared with apply_chat_template in test_chat.py.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SHORT_RUN
from processes import running

from lorabench import data
from lorabench.config import ConfigErrors, DataConfig
from lorabench.data import rendering
from lorabench.zoo import TINY_GEMMA

TURNS = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
# Each counts to 100,000, as far as the sandbox lets it.
LOOPS = "".join(f"{{% for {name} in range(100000) %}}" for name in "abc") + "{% endfor %}" * 3
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['jinja2'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch ESCAPED') }}",
    "{{ self._TemplateReference__context.environment.globals }}{{ ''.__doc__.__class__.mro() }}",
    "{{ (''|attr('__class__')).mro() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages)[0] + messages.__len__.__self__ }}",
    "{{ messages.append(1) }}",
    "{% set _ = messages[0].update({'content': 'other'}) %}",
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_GEMMA)


@pytest.fixture
def refused(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The one line that a template is refused with; its third example is the first with 'c'."""
    examples = [data.Example(prompt, "yes", id=prompt) for prompt in "abcd"]
    settings = DataConfig(name="t", source="jsonl", max_length=99, chat_template=True)

    def refuse(template: str) -> str:
        monkeypatch.setattr(loaded, "chat_template", template)
        with pytest.raises(ConfigErrors) as error:
            data.tokenise(examples, loaded, settings)
        (line,) = error.value.errors
        assert "\n" not in line
        assert line.startswith("data.chat_template: must render every example; the template of ")
        assert f"'{loaded.name_or_path}'" in line
        assert line.endswith("set data.chat_template=false and write the turns into data.prompt")
        return line

    return refuse


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('a system message must come first') }}", "a system message must come"),
        ("{% if %}", r"Expected an expression, got 'end of statement block' (line 1 of the temp"),
        ("{% if true %}", "Unexpected end of template"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 + 'x' }}", "TypeError: "),
        ("{{ range(10**10)|length }}", "OverflowError: Range too big"),
        ("{{ '\ud800' }}", "UnicodeEncodeError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself too deeply"),
        (f"{{{{ {'(' * 5000}1{')' * 5000} }}}}", "it calls itself too deeply"),
        ("{{ 'a' * 10**10 }}", "it takes more than 512 MiB of memory"),
        ("{{ '%1000000000d' % 1 }}", "it takes more than 512 MiB of memory"),
        ("{{ 'a' * 10**6 }}", "it adds 1000"),
    ],
)
def test_a_template_that_fails_is_told_in_one_line(
    template: str, reason: str, refused: Any
) -> None:
    assert f"fails on example 1 of 4, 'a': {reason}" in refused(template + TURNS)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(
    template: str, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(template + TURNS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("template", "example"),
    [(LOOPS, "3 of 4, 'c'"), ("{{ 10**(10**9) }}", "1 of 4, 'a'")],  # computed when it is compiled
)
def test_a_template_that_does_not_end_is_ended(
    template: str, example: str, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "CPU_SECONDS", 0.2)
    only_c = f"{{% if messages[0]['content'] == 'c' %}}{template}{{% endif %}}{TURNS}"
    assert f"fails on example {example}: it takes more than 0.2 s" in refused(only_c)


def test_a_process_that_waits_is_ended(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "WALL_SECONDS", 0.2)
    monkeypatch.setattr(rendering, "pair", lambda *_: time.sleep(60))
    assert "fails on example 1 of 4, 'a': it does not end within 0.2 s" in refused(TURNS)


def test_a_process_that_dies_is_told(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "pair", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert "its process ended without an answer (SIGKILL)" in refused(TURNS)


def test_several_templates_without_a_default_are_refused(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "chat_template", {"rag": TURNS, "tool_use": TURNS})
    settings = DataConfig(name="t", source="jsonl", max_length=99, chat_template=True)
    with pytest.raises(
        ConfigErrors, match=r"must have a template named 'default'.* has rag, tool_"
    ):
        data.tokenise([data.Example("a", "b", id="0")], loaded, settings)


def test_rendering_leaves_the_process_as_it_was(loaded: Any) -> None:
    """Limits, timers and processes are the child's alone."""

    def state() -> tuple[Any, ...]:
        children = {child.pid for child in psutil.Process().children()}
        return resource.getrlimit(resource.RLIMIT_AS), set(os.listdir("/proc/self/fd")), children

    before = state()
    pairs = [(f"prompt {i}", "x" * 50_000) for i in range(20)]  # more than a pipe holds
    assert len(rendering.render_pairs(TURNS, loaded, pairs, {})) == 20
    assert state() == before
    assert signal.getitimer(signal.ITIMER_REAL) == signal.getitimer(signal.ITIMER_PROF) == (0, 0)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**10 }}", "it takes more than 512 MiB of memory"),
        (LOOPS, "it takes more than 5 s"),
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' of 'type' object"),
    ],
)
def test_a_command_with_such_a_template_ends_in_one_line(
    template: str, reason: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY_GEMMA, base)
    (base / "chat_template.jinja").write_text(template + TURNS)
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*SHORT_RUN[:-4], "data=jsonl", "data.max_length=64", "data.chat_template=true"]
    words += [f"data.train.path={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'out'}"]
    words += ["model=local", f"model.path={base}"]
    with running(tmp_path / "said", "train", *words) as process:
        assert process.wait(60) == 2
    (line,) = process.said.splitlines()
    assert line.startswith("data.chat_template: ") and f"the template of '{base}'" in line
    assert reason in line
