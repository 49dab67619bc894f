"""Chat templates rendered in a process of their own, which is ended if it takes too much.

A template is a program that comes with the tokenizer. The sandbox that transformers renders it in
keeps it from Python and from files, but not from running for ever or from filling the memory.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from lorabench import interrupt
from lorabench.config import ConfigErrors, first_line

# Of one example, whose conversation takes a real template about a millisecond.
CPU_SECONDS = 5.0
WALL_SECONDS = 60.0  # for a process that waits; one that computes on a busy machine gets there too
MEMORY_BYTES = 512 << 20  # beyond what this process has; a real template takes less than 1 MiB
ADDED_CHARACTERS = 100_000  # around prompt and completion; a real template adds a few thousand


def render_all(
    template: str, tokenizer: Any, pairs: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Render prompts and completions, each as `render` does.

    Args:
        pairs: prompt and completion of each example.
    Raises:
        ConfigErrors: the template refuses an example, is no template, or takes too much of
            anything; names the example.
    """
    # The child inherits its imports: a lock that another thread holds now stays locked in there.
    from transformers.utils import chat_template_utils  # noqa: F401

    readable, writable = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which the child does not have: it only runs Jinja.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _serve(writable, template, tokenizer, pairs)
    os.close(writable)
    found: list[tuple[str, str]] = []
    reason = None
    try:
        with open(readable, encoding="utf-8") as lines:
            for line in lines:
                answer = json.loads(line)
                if isinstance(answer, str):
                    reason = answer
                    break
                found.append(tuple(answer))
    finally:
        os.kill(child, signal.SIGKILL)  # changes nothing for a process that has ended
        _, status = os.waitpid(child, 0)
    if len(found) < len(pairs):
        raise ConfigErrors(
            f"data.chat_template: must render every example; the template of "
            f"'{tokenizer.name_or_path}' fails on example {len(found) + 1} of {len(pairs)}, "
            f"{pairs[len(found)][0]!r:.40}: {reason or _how_it_ended(status)}; correct the "
            f"template, or set data.chat_template=false and write the turns into data.prompt"
        )
    return found


def render(template: str, tokenizer: Any, prompt: str, completion: str) -> tuple[str, str]:
    """Return the prompt with the opening of the assistant's turn, and the whole conversation."""
    turns = [{"role": "user", "content": prompt}]
    opened = tokenizer.apply_chat_template(
        turns, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    turns.append({"role": "assistant", "content": completion})
    return opened, tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)


# --- in the child ----------------------------------------------------------------------------


def _serve(
    writable: int, template: str, tokenizer: Any, pairs: Sequence[tuple[str, str]]
) -> NoReturn:
    """Write one line of JSON per example: its two texts, or why it cannot be rendered."""
    try:
        for number in interrupt.HEARD:  # the parent decides
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)  # which ends the process, whatever it is at
        _limit_memory()
        with open(writable, "wb") as file:
            for prompt, completion in pairs:
                _answer(file, template, tokenizer, prompt, completion)
    finally:
        os._exit(0)  # never back into the caller


def _answer(file: IO[bytes], template: str, tokenizer: Any, prompt: str, completion: str) -> None:
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        texts = render(template, tokenizer, prompt, completion)
        added = max(map(len, texts)) - len(prompt) - len(completion)
        too_long = f"it adds {added} characters, more than {ADDED_CHARACTERS}"
        answer = texts if added <= ADDED_CHARACTERS else too_long
        line = json.dumps(answer, ensure_ascii=False).encode()
    except Exception as error:
        line = json.dumps(_reason(error)).encode()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    file.write(line + b"\n")
    file.flush()


def _limit_memory() -> None:
    """Bound the address space; where it cannot be known (macOS), it stays as it is."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _reason(error: Exception) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it calls itself too deeply"
    text = first_line(error, None)
    if isinstance(error, TemplateSyntaxError):
        return f"{text.rstrip('.')} (line {error.lineno} of the template)"
    if isinstance(error, TemplateError):
        return text.rstrip(".")
    return f"{type(error).__name__}: {text.rstrip('.')}"


# --- in the parent ---------------------------------------------------------------------------


def _how_it_ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGPROF:
        return f"it takes more than {CPU_SECONDS:g} s"
    if code == -signal.SIGALRM:
        return f"it does not end within {WALL_SECONDS:g} s"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"its process ended without an answer ({how})"
