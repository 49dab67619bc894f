"""The command line: one function per verb, heavy imports inside.

Only this room and the launcher know Hydra.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable

from lorabench import masking
from lorabench.cli.beginning import init
from lorabench.cli.comparing import compare
from lorabench.cli.completing import completion
from lorabench.cli.composing import compose, register
from lorabench.cli.exporting import export
from lorabench.cli.fetching import fetch
from lorabench.cli.generating import generate
from lorabench.cli.mistakes import guarded
from lorabench.cli.planning import plan
from lorabench.cli.planning import split as split_plan
from lorabench.cli.reading import runs
from lorabench.cli.replaying import diff, replay
from lorabench.cli.reporting import report, watch
from lorabench.cli.serving import evaluate, work
from lorabench.cli.settling import settle
from lorabench.cli.syncing import sync
from lorabench.cli.training import train
from lorabench.cli.verbs import EXAMPLES, EXIT_CODES, VERBS
from lorabench.cli.words import conf_folder, with_line_breaks

__all__ = ["VERBS", "compose", "conf_folder", "main", "register"]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = with_line_breaks(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        _overview().print_help()
        return 0
    if verb == "--version":
        from lorabench import __version__

        print(f"lorabench {__version__}")
        return 0
    handlers: dict[str, Callable[[list[str]], int]] = {
        "init": init,
        "train": train,
        "plan": plan,
        "fetch": fetch,
        "work": work,
        "evaluate": evaluate,
        "runs": runs,
        "compare": compare,
        "report": report,
        "watch": watch,
        "settle": settle,
        "sync": sync,
        "generate": generate,
        "export": export,
        "replay": replay,
        "diff": diff,
    }
    handlers["completion"] = lambda words: completion(words, handlers)
    as_json = "--json" in arguments
    with masking.applied(arguments[1:]):
        return guarded(
            lambda: handlers.get(verb, _refuse(verb))(arguments[1:]),
            _composed(verb, arguments[1:]),
            as_json,
        )


def _composed(verb: str, arguments: list[str]) -> list[str] | None:
    """The words that configs are composed from; None: the verb composes none."""
    if verb == "plan":
        with contextlib.suppress(ValueError):  # the verb itself refuses them
            return split_plan(arguments)[1]
    return arguments if verb in ("train", "fetch") else None


def _refuse(verb: str) -> Callable[[list[str]], int]:
    def refuse(_: list[str]) -> int:
        from lorabench.config import ConfigErrors, did_you_mean

        raise ConfigErrors(
            f"lorabench: the first word must be one of {', '.join(VERBS)}; "
            f"got {did_you_mean(verb, VERBS)}"
        )

    return refuse


def _overview() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {name:11}{text}" for name, text in VERBS.items())
    return argparse.ArgumentParser(
        prog="lorabench",
        usage="lorabench VERB ...",
        description="Compose a LoRA experiment from configs, sweep it over one shared frozen base, "
        "and get a verdict you can trust and replay.",
        epilog=f"verbs:\n{verbs}\n\n{EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
