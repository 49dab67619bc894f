"""Completion in a shell: verbs, their options, and Hydra's own completion of keys and groups."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from lorabench.cli.telling import Parser
from lorabench.cli.verbs import COMPOSING, VERBS

LIST = """\
_lorabench() {
    local IFS=$'\\n'
    COMPREPLY=($(lorabench completion --line "${COMP_LINE:0:$COMP_POINT}" 2>/dev/null))
"""
STRIP = """\
    # Bash replaces what follows the last = or : of a word, not the word.
    local word="${COMP_LINE:0:$COMP_POINT}"; word="${word##* }"
    local kept="${word%"${word##*[=:]}"}"
    COMPREPLY=("${COMPREPLY[@]#"$kept"}")
"""
END = """\
}
complete -o nospace -o default -F _lorabench lorabench
"""
ZSH = """\
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""
SCRIPTS = {
    "bash": LIST + STRIP + END,
    "zsh": ZSH + LIST + END,  # which replaces whole words
    "fish": "complete -c lorabench -a '(lorabench completion --line (commandline -cp))'\n",
}
# Options of Hydra that serve here; its help does not name them.
HYDRAS = ("-m", "--multirun", "--cfg", "--package", "--resolve", "--info", "--config-dir", "--help")


def completion(arguments: list[str], handlers: Mapping[str, Callable[[list[str]], int]]) -> int:
    """lorabench completion bash|zsh|fish, or --line TEXT

    Args:
        handlers: what each verb calls.
    """
    parser = Parser(
        prog="lorabench completion",
        description=VERBS["completion"],
        epilog='bash: eval "$(lorabench completion bash)" in ~/.bashrc; fish: '
        "lorabench completion fish | source",
    )
    parser.add_argument("shell", nargs="?", choices=tuple(SCRIPTS))
    parser.add_argument("--line", metavar="TEXT", help="print what may come next in this command")
    options = parser.parse_args(arguments)
    if options.line is not None:
        print("\n".join(candidates(options.line, handlers)))
    else:
        print(SCRIPTS[options.shell or "bash"], end="")
    return 0


def candidates(line: str, handlers: Mapping[str, Callable[[list[str]], int]]) -> list[str]:
    """What may stand in place of the last word of a command line; files are the shell's.

    Args:
        line: from `lorabench` up to the cursor.
    """
    words = line.split()[1:]
    word = "" if line.endswith(" ") or not words else words.pop()
    if not words:
        return [verb for verb in VERBS if verb.startswith(word)]
    verb = words[0]
    if verb not in VERBS:
        return []
    found = []
    if word.startswith("-"):
        options = HYDRAS if verb == "train" else _options(handlers[verb])
        found = [one for one in options if one.startswith(word)]
    elif verb in COMPOSING:
        found = _of_hydra([one for one in words[1:] if "=" in one or one == "-m"], word)
    return [one for one in found if one != word]


def _options(handler: Callable[[list[str]], int]) -> list[str]:
    """The options that a verb's help names."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        handler(["--help"])
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown.getvalue())))


def _of_hydra(words: list[str], word: str) -> list[str]:
    """Keys, groups and names by Hydra's completion; values of a sweep behind their last comma."""
    from hydra._internal.core_plugins.bash_completion import BashCompletion

    from lorabench.cli.composing import loader

    key, equals, values = word.partition("=")
    done, comma, last = values.rpartition(",")
    asked = f"{key}={last}" if equals and comma else word
    swept = [one for one in words if "," not in one.partition("=")[2]]  # of one config
    with loader() as found:
        plugin: Any = BashCompletion(found)
        matches: list[str] = plugin._query("train", " ".join([*swept, asked]))
    if not comma:
        return matches
    return [f"{key}={done},{one.partition('=')[2]}" for one in matches]
