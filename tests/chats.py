"""Chat templates of five families, small tokenizers for them, and conversations."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from lorabench import data
from lorabench.config import ConfigErrors, DataConfig
from lorabench.data import conversations

# Of Mistral 7B Instruct v0.3's form of turns; its own is longer, and takes tools.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Where a template writes an assistant turn, and the same with generation marks around what the
# model writes. Gemma's and Llama 3's marked templates are TRL's own.
MARKED = {
    "mistral": [
        (
            "{{ ' ' + message['content'] + eos_token }}",
            "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}",
        )
    ],
    "chatml": [
        (
            "{{ message['content'] + '<|im_end|>' + '\\n' }}",
            "{% if message['role'] == 'assistant' %}{% generation %}"
            "{{ message['content'] + '<|im_end|>' + '\\n' }}{% endgeneration %}{% else %}"
            "{{ message['content'] + '<|im_end|>' + '\\n' }}{% endif %}",
        )
    ],
    "qwen3": [
        (
            "{%- if loop.index0 > ns.last_query_index %}",
            "{{- '<|im_start|>assistant\\n' }}{%- generation %}"
            "{%- if loop.index0 > ns.last_query_index %}",
        ),
        ("'<|im_start|>' + message.role + '\\n<think>", "'<think>"),
        ("{{- '<|im_start|>' + message.role + '\\n' + content }}", "{{- content }}"),
        (
            "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}",
            "{{- '<|im_end|>\\n' }}{%- endgeneration %}\n    {%- elif message.role == \"tool\" %}",
        ),
    ],
}
FAMILIES = ("gemma", "llama3", "qwen3", "chatml", "mistral")
# What ends a turn, by family or built-in template.
ENDS = {
    "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "qwen3": "<|im_end|>", "qwen": "<|im_end|>",
    "chatml": "<|im_end|>", "mistral": "</s>", "deepseek": "<｜end▁of▁sentence｜>",
}  # fmt: skip
# The first one or two are BOS and EOS.
SPECIAL = {
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "llama3": [
        "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|end_of_text|>",
    ],
    "qwen3": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "chatml": ["<s>", "<|im_end|>", "<|im_start|>", "</s>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "deepseek": [
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    ],
    "phi": ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "glm": [
        "[gMASK]", "<|endoftext|>", "<sop>", "<|user|>", "<|assistant|>", "<|system|>",
        "<|observation|>",
    ],
}  # fmt: skip
SPECIAL["qwen"] = SPECIAL["qwen3"]
CORPUS = [
    "What is the capital of France? The capital is Paris.\n\nHello there, how are you?\n",
    "user\nassistant\nmodel\nsystem\n\n<think>\n\n</think>\n\n1 + 1 = 2\n\n\n", "café 你好 😀",
] * 20  # fmt: skip


def of_trl(name: str) -> str:
    """A template that TRL brings along as a file."""
    import trl

    place = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return place.read_text(encoding="utf-8")


def plain(family: str) -> str:
    """A family's template, without marks."""
    return {"chatml": CHATML, "mistral": MISTRAL}.get(family) or of_trl(family)


def marked(family: str) -> str:
    """The same, with generation marks."""
    if family not in MARKED:
        return of_trl(f"{family}_training")
    text = plain(family)
    for before, after in MARKED[family]:
        assert before in text, f"the template of {family} is another one: {before!r} is not in it"
        text = text.replace(before, after)
    return text


@functools.cache
def tokenizer(family: str, template: str | None = None) -> Any:
    """A byte-level tokenizer with a family's special tokens, and merges across line breaks."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = SPECIAL[family]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=special[0],
        eos_token=special[1],
        additional_special_tokens=special[2:],
        name_or_path=f"my-{family}",
    )
    made.chat_template = template
    return made


def says(*texts: str, first: str = "user") -> list[dict[str, Any]]:
    """Turns of user and assistant, by turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def settings(**keys: Any) -> DataConfig:
    """A data config of messages."""
    shared = {
        "name": "t", "source": "jsonl", "format": "messages", "chat_template": True,
        "max_length": 4096,
    }  # fmt: skip
    return DataConfig(**(shared | keys))


def example(row: Any, cfg: DataConfig) -> data.Example:
    """A row, as its reader makes an example of it; a list is a row's turns."""
    if isinstance(row, list):
        row = {conversations.column_of(cfg): row}
    row = json.loads(json.dumps(row))  # nobody else's objects
    texts = conversations.as_example(conversations.conversation(row, cfg))
    return data.Example(texts[0], texts[1], "0", texts[2])


def tokenised(family: str, rows: list[Any], template: Any, **keys: Any) -> data.Tokens:
    """Rows, through a template given as text, or the tokenizer's own with True."""
    found = tokenizer(family, template if isinstance(template, str) else None)
    stops = keys.pop("stops", ())
    cfg = settings(**keys)
    return data.tokenise([example(row, cfg) for row in rows], found, cfg, stops)


def mask(tokens: data.Tokens, index: int = 0) -> list[int]:
    """1 at each token of an example that carries a loss."""
    found = [0] * len(tokens.input_ids.row(index))
    bounds = list(tokens.spans.row(index))
    for begin, end in zip(bounds[::2], bounds[1::2], strict=True):
        found[begin:end] = [1] * (end - begin)
    return found


def trained_texts(tokens: data.Tokens, tokenizer: Any, index: int = 0) -> list[str]:
    """The text of each stretch that carries a loss."""
    ids, bounds = list(tokens.input_ids.row(index)), list(tokens.spans.row(index))
    return [
        tokenizer.decode(ids[begin:end])
        for begin, end in zip(bounds[::2], bounds[1::2], strict=True)
    ]


PLAIN = says("What is it?", "It is 4.")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look the weather up",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Orléans"}}}
TOOLS_USED = [
    {"role": "user", "content": "Weather in Orléans?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "18 degrees", "name": "weather"},
    {"role": "assistant", "content": "18 degrees."},
]


def seen(
    row: Any, family: str = "qwen3", template: str | None = None, **keys: Any
) -> tuple[str, list[str]]:
    """The whole text as the model sees it, and the trained stretches of it."""
    tokens = tokenised(family, [row], template or plain(family), **({"add_eos": False} | keys))
    return (
        tokenizer(family).decode(list(tokens.input_ids.row(0))),
        trained_texts(tokens, tokenizer(family)),
    )


def applied(
    turns: list[Any], family: str = "qwen3", template: str | None = None, **more: Any
) -> str:
    """The same by transformers."""
    return tokenizer(family).apply_chat_template(
        turns, chat_template=template or plain(family), tokenize=False, **more
    )


def refusal(rows: list[Any], family: str = "qwen3", template: Any = None, **keys: Any) -> str:
    with pytest.raises(ConfigErrors) as error:
        tokenised(family, rows, plain(family) if template is None else template, **keys)
    (line,) = error.value.errors
    assert "\n" not in line
    return line
