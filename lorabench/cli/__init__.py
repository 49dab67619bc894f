"""The command line: one verb a function, heavy imports inside.

Only this room and the launcher know Hydra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from lorabench.cli.composing import compose, conf_folder, register
from lorabench.cli.exporting import export
from lorabench.cli.mistakes import fail, guarded
from lorabench.cli.reading import compare, runs
from lorabench.cli.serving import evaluate, work
from lorabench.cli.training import plan, train
from lorabench.cli.verbs import EXAMPLES, VERBS

__all__ = ["VERBS", "compose", "conf_folder", "main", "register"]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        _overview().print_help()
        return 0
    if verb == "--version":
        from lorabench import __version__

        print(f"lorabench {__version__}")
        return 0
    handlers: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "plan": plan,
        "work": work,
        "evaluate": evaluate,
        "runs": runs,
        "compare": compare,
        "export": export,
    }
    if verb not in handlers:
        from lorabench.config import did_you_mean

        return fail(
            [
                f"lorabench: the first word must be one of {', '.join(VERBS)}; "
                f"got {did_you_mean(verb, VERBS)}"
            ]
        )
    composed = arguments[1:] if verb in ("train", "plan") else None
    return guarded(lambda: handlers[verb](arguments[1:]), composed)


def _overview() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {name:9}{text}" for name, text in VERBS.items())
    return argparse.ArgumentParser(
        prog="lorabench",
        usage="lorabench VERB ...",
        description="Compose a LoRA experiment from configs, sweep it over one shared frozen base, "
        "and get a verdict you can trust and replay.",
        epilog=f"verbs:\n{verbs}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
