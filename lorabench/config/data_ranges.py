"""The ranges of the data group; see `ranges`."""

from __future__ import annotations

import re

from lorabench.config import parts
from lorabench.config.choices import FORMATS, METRICS, Found
from lorabench.config.schema import DataConfig

# What a template is called with in any case.
TAKEN = {
    "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_assistant_tokens_mask", "tokenize",
}  # fmt: skip


def check(found: Found, data: DataConfig) -> None:
    """Add what is wrong with the data group to `found`."""
    must, one_of = found.must, found.one_of
    one_of("data.source", data.source)
    if data.source == "skills":
        must(bool(data.skills), "data.skills", "at least one skill", data.skills)
        must(
            1 <= data.min_word_length <= data.max_word_length,
            "data.min_word_length",
            f"in [1, max_word_length={data.max_word_length}]",
            data.min_word_length,
        )
    elif data.source == "gym":
        remedy = "for example data.gym={chain_sum: {max_terms: 3}}"
        tasks = data.gym if isinstance(data.gym, dict) else {}
        must(bool(tasks), "data.gym", "a mapping of tasks to their settings", data.gym, remedy)
        for task, settings in tasks.items():
            holds = settings is None or isinstance(settings, dict)
            must(holds, f"data.gym.{task}", "a mapping of settings, or null", settings, remedy)
        must(data.gym_seed >= 0, "data.gym_seed", "at least 0", data.gym_seed)
        must("gym" not in data.metric or not data.tests, "data.tests",
             "left out with data.metric=[gym], which scores questions of its own tasks",
             data.tests, "leave gym out of data.metric")  # fmt: skip
    elif not data.mixture:
        must(
            data.train.path is not None,
            "data.train.path",
            {"jsonl": "a file", "path": "a file, a folder, a glob or a dataset id"}.get(
                data.source, "a dataset id or folder"
            ),
            None,
            "set data.train.path=...",
        )
    if data.source != "gym":
        must(data.gym is None, "data.gym", f"null with data.source={data.source}", data.gym)
        must("gym" not in data.metric, "data.metric", "without gym where data.source is not gym",
             "gym", "use data=gym")  # fmt: skip
    for split in ("train", "validation", "test"):
        one_of(f"data.{split}.sample_by", getattr(data, split).sample_by)
    must(bool(data.metric), "data.metric", f"a list out of {', '.join(METRICS)}", data.metric)
    for metric in data.metric:
        one_of("data.metric", metric)
    must(
        "answer" not in data.metric or data.answer_pattern is not None,
        "data.answer_pattern",
        "a regular expression where data.metric asks for answer",
        data.answer_pattern,
    )
    if data.answer_pattern is not None:
        try:
            re.compile(data.answer_pattern)
        except re.error as error:
            found.errors.append(f"data.answer_pattern: must be a regular expression; {error}")
    must(
        all(data.answer_stop),
        "data.answer_stop",
        "a list of texts, none of them empty",
        data.answer_stop,
        "for example data.answer_stop=['Question:']",
    )
    must(data.max_length >= 2, "data.max_length", "at least 2 tokens", data.max_length)
    for key in ("num_train", "num_validation", "num_test"):
        value = getattr(data, key)
        must(value is None or value >= 1, f"data.{key}", "at least 1", value)
    for key in ("answer_examples", "answer_max_new_tokens"):
        must(getattr(data, key) >= 1, f"data.{key}", "at least 1", getattr(data, key))
    for key in ("validation_fraction", "test_fraction"):
        must(0 < getattr(data, key) < 1, f"data.{key}", "in (0, 1)", getattr(data, key))
    must(
        data.validation_fraction + data.test_fraction < 1,
        "data.test_fraction",
        "such that some examples are left to train on",
        data.test_fraction,
    )
    _format(found, data)
    parts.check(found, data, _format)


def _format(found: Found, data: DataConfig) -> None:
    """What a row is, and how it becomes tokens."""
    must = found.must
    for key in ("format", "system", "loss_on", "too_long"):
        found.one_of(f"data.{key}", getattr(data, key))
    must(
        0 <= data.allow_left_out <= 1,
        "data.allow_left_out",
        "a part in [0, 1]",
        data.allow_left_out,
    )
    template = data.chat_template
    must(
        isinstance(template, bool | str) and template != "",
        "data.chat_template",
        "true, false, chatml, gemma, llama3, qwen, or a file",
        template,
    )
    kwargs = data.chat_template_kwargs
    must(
        kwargs is None
        or (isinstance(kwargs, dict) and all(isinstance(key, str) for key in kwargs)),
        "data.chat_template_kwargs",
        "a mapping of names to values",
        kwargs,
        "for example data.chat_template_kwargs={enable_thinking: false}",
    )
    taken = sorted({*kwargs} & TAKEN) if isinstance(kwargs, dict) else []
    must(
        not taken,
        "data.chat_template_kwargs",
        "names that the template does not get anyway",
        ", ".join(map(str, taken)),
        "leave them out",
    )
    if data.format not in FORMATS:
        return
    is_chat = data.format in ("messages", "sharegpt")
    if data.format == "prompt_completion":
        must(
            kwargs is None or template is not False,
            "data.chat_template_kwargs",
            "left out with data.chat_template=false, for no template gets it",
            kwargs,
            "set data.chat_template=true",
        )
    default = DataConfig()
    idle = {
        "messages": is_chat, "system": is_chat, "merge_turns": is_chat, "loss_on": is_chat,
        "tools": is_chat, "text": data.format == "text",
        "prompt": data.format == "prompt_completion",
        "completion": data.format == "prompt_completion",
    }  # fmt: skip
    for key, is_used in idle.items():
        given = getattr(data, key)
        must(
            is_used or given == getattr(default, key),
            f"data.{key}",
            f"left out with data.format={data.format}",
            given,
        )
    if data.source in ("skills", "gym"):
        must(
            data.format == "prompt_completion",
            "data.format",
            f"prompt_completion with data.source={data.source}",
            data.format,
        )
    if data.format == "text":
        must(template is False, "data.chat_template", "false with data.format=text", template)
        must(
            data.too_long == "leave_out",
            "data.too_long",
            "left out with data.format=text, whose texts are cut into pieces",
            data.too_long,
        )
