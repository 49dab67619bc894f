"""Chat templates: the reference is transformers' own apply_chat_template."""

import itertools
import time
from datetime import datetime

import pytest

from lorabench import data
from lorabench.config import ConfigErrors, DataConfig
from lorabench.zoo import TINY_GEMMA


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_GEMMA)


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# The beginning of Llama 3.2's own; 3.1's has the second line alone, and a fixed date.
DATED = """
{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "date: " + date_string + "\\n\\n" }}
{%- for m in messages %}
{{- '[' + m['role'] + ']' + m['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}
"""
LLAMA_3_1 = DATED.replace("strftime_now is defined", "false")


def examples(*pairs):
    return [data.Example(*pair, id=str(i)) for i, pair in enumerate(pairs)]


def config(**kwargs):
    shared = {"name": "t", "source": "jsonl", "max_length": 99, "chat_template": True}
    return DataConfig(**{**shared, **kwargs})


@pytest.fixture
def chat(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    return tokenizer


def test_chat_template(chat):
    tokens = data.tokenise(examples(("hi", "yo")), chat, config())
    (ids,), (start,) = tokens.input_ids, tokens.completion_start
    assert chat.decode(ids[:start]) == "<bos>[user]hi<eos>\n[assistant]"
    assert chat.decode(ids[start:]) == "yo<eos>"  # the template's EOS, not a second; no newline
    assert ids.count(chat.bos_token_id) == 1
    whole = data.tokenise(examples(("hi", "yo")), chat, config(add_eos=False))
    assert chat.decode(whole.input_ids[0][start:]) == "yo<eos>\n"


def test_chat_template_without_eos_gets_one(chat, monkeypatch):
    monkeypatch.setattr(chat, "chat_template", CHAT.replace("{{ eos_token }}", ""))
    tokens = data.tokenise(examples(("hi", "yo"), ("a", "")), chat, config())
    start = tokens.completion_start[0]
    assert chat.decode(tokens.input_ids[0][start:]) == "yo\n<eos>"
    assert tokens.num_empty == 1


def test_bad_chat_templates(tokenizer, chat, monkeypatch):
    monkeypatch.setattr(chat, "chat_template", "{{ messages | length }}" + CHAT)
    with pytest.raises(
        ConfigErrors,
        match=r"must write a conversation that begins with its prompt; "
        r".* gives '2<bos>.*' in place of '1<bos>.*' at token 0",
    ):
        data.tokenise(examples(("hi", "yo")), chat, config())
    monkeypatch.setattr(chat, "chat_template", None)
    with pytest.raises(ConfigErrors, match=r"^data\.chat_template: must be false, or a template"):
        data.tokenise(examples(("hi", "yo")), chat, config())


def conversation(prompt, completion):
    turns = [{"role": "user", "content": prompt}]
    return turns, [*turns, {"role": "assistant", "content": completion}]


@pytest.mark.parametrize(
    "template",
    [
        CHAT,
        LLAMA_3_1,
        "\n \n" + CHAT,  # white space before the first block is the template's own
        "  {% if true %}\n  x{% endif %}\n" + CHAT,
        {"default": CHAT, "tool_use": "{{ raise_exception('not this one') }}"},
    ],
)
def test_ids_are_those_of_apply_chat_template(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    pairs = [("hi ", "yo"), ("<bos>a\n", " b\n"), ("é", "x=1")]
    tokens = data.tokenise(examples(*pairs), tokenizer, config(add_eos=False))
    for pair, ids, start in zip(pairs, tokens.input_ids, tokens.completion_start, strict=True):
        turns, whole = conversation(*pair)
        options = {"tokenize": True, "return_dict": False}
        assert ids == tokenizer.apply_chat_template(whole, **options)
        assert ids[:start] == tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, **options
        )


@pytest.fixture
def zones():
    """Sets the time zone."""
    with pytest.MonkeyPatch.context() as patch:

        def move(zone):
            patch.setenv("TZ", zone)
            time.tzset()

        yield move
    time.tzset()


FORMATS = ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y %H:%M:%S", "%y%m%d %j %p %I", "%e %F %x %X"]


PADDINGS = ["", "\n", "  {% if true %}{% endif %}\n"]
QUICK = [(DATED, PADDINGS[1]), (FORMATS[2], PADDINGS[0]), (FORMATS[4], PADDINGS[2])]


@pytest.mark.parametrize(
    ("template", "padding"),
    [
        one if one in QUICK else pytest.param(*one, marks=pytest.mark.slow)
        for one in itertools.product([DATED, *FORMATS], PADDINGS)
    ],
)
def test_a_dated_template_gets_26_july_2024(tokenizer, zones, monkeypatch, template, padding):
    """Without it one run id stands for other tokens every day, and in every time zone."""
    from transformers.utils import chat_template_utils

    if template is not DATED:  # in a macro, where only the template's own globals are seen
        template = (
            f"{{% macro today() %}}{{{{ strftime_now('{template}') }}}}{{% endmacro %}}"
            f"{{{{ bos_token + today() }}}}{CHAT}"
        )
    monkeypatch.setattr(tokenizer, "chat_template", padding + template)

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(*now)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    now = [2024, 7, 26]
    _, whole = conversation("hi", "yo")
    expected = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    hashes = set()
    for now in ([2024, 7, 26], [1999, 12, 31, 23, 59]):  # noqa: B007 (Clock reads it)
        for zone in ("Pacific/Pago_Pago", "Pacific/Kiritimati"):
            zones(zone)
            tokens = data.tokenise(examples(("hi", "yo")), tokenizer, config(add_eos=False))
            assert tokens.input_ids == [expected]
            hashes.add(tokens.hash())
    assert len(hashes) == 1


def test_text_that_a_template_removes_is_noted(tokenizer, monkeypatch):
    """Reasoning that the template cuts out of the assistant's turn is not trained on."""
    cuts = CHAT.replace("m['content']", "m['content'].split('</t>')[-1]")
    monkeypatch.setattr(tokenizer, "chat_template", cuts)
    pairs = [("7+1=", "<t>carry</t>8"), ("1+1=", " 2 "), ("2+1=", "<t>no</t>3")]
    tokens = data.tokenise(examples(*pairs), tokenizer, config())
    decoded = [
        tokenizer.decode(ids[start:], skip_special_tokens=True)
        for ids, start in zip(tokens.input_ids, tokens.completion_start, strict=True)
    ]
    assert decoded == ["8", " 2 ", "3"]
    assert tokens.notes("train", config()) == [
        "data.train: the chat template removes text from 2 of 3 completions, which is not trained "
        "on; the first, '<t>carry</t>8', becomes '8'; to keep all text, set "
        "data.chat_template=false and write the turns into data.prompt"
    ]
    monkeypatch.setattr(tokenizer, "chat_template", CHAT.replace("['content']", "['content']|trim"))
    assert data.tokenise(examples(*pairs), tokenizer, config()).notes("train", config()) == []
