"""The verb that sends offline W&B runs to a server: sync."""

from __future__ import annotations

from pathlib import Path

from lorabench.cli.telling import Parser, tell
from lorabench.cli.verbs import VERBS


def sync(arguments: list[str]) -> int:
    """lorabench sync FOLDER ..."""
    parser = Parser(prog="lorabench sync", description=VERBS["sync"])
    parser.add_argument(
        "folders", type=Path, metavar="FOLDER", nargs="+", help="a sweep, such as outputs/lm_head"
    )
    parser.epilog = "what was sent once is left out; WANDB_BASE_URL and WANDB_API_KEY as for wandb"
    options = parser.parse_args(arguments)

    from lorabench.config import ConfigErrors
    from lorabench.tracking import syncing

    if missing := [folder for folder in options.folders if not folder.is_dir()]:
        raise ConfigErrors(
            f"FOLDER: must be the folder of a sweep; '{folder}' does not exist"
            for folder in missing
        )
    places: list[Path] = []
    for folder in options.folders:
        found, running = syncing.unsent(folder)
        places += found
        if running:
            tell([f"{folder}: {len(running)} runs are left out, since they are still training"])
        if not found:
            print(f"{folder}: nothing to send to W&B")
    if not places:
        return 0

    def notify(line: str) -> None:
        tell([line])

    left = syncing.send(places, notify)
    if left:
        line = f"{len(left)} of {len(places)} runs were not sent; the same command goes on"
        return tell([line], 1)
    print(f"{len(places)} of {len(places)} runs are at the server")
    return 0
