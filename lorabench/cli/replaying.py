"""The verbs that hold two runs against each other: replay and diff."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.cli.telling import Parser
from lorabench.cli.verbs import VERBS

if TYPE_CHECKING:
    from lorabench.record import Record
    from lorabench.replay import Compared

CONTENTS = {  # of a plan, by the name of a hash; what each is of
    "weights": "the base (model.path)",
    "tokenizer": "the base's tokenizer",
    "chat_template": "the chat template (data.chat_template)",
    "train": "the training data (data.train)",
    "validation": "the validation data",
    "test": "the test data",
    "start": "the adapter it starts from (start_from)",
}


def replay(arguments: list[str]) -> int:
    """lorabench replay RUN [--verify] [--pack-size N] [--out DIR] [--json]"""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lorabench import interrupt, tracking
    from lorabench.replay import compared, configs_of, members_of
    from lorabench.runs import folder_of

    parser = Parser(
        prog="lorabench replay",
        description=VERBS["replay"],
        epilog="exit code 0: identical or within rounding; 1: different; 2: refused",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or the beginning of its id")
    parser.add_argument(
        "--verify", action="store_true",
        help="compare hashes, every logged loss and the adapter with the record",
    )  # fmt: skip
    parser.add_argument(
        "--pack-size", type=int, metavar="N", help="train in a pack of N of its runs; 1: alone"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="a new folder; default: replays/ID beside the sweep"
    )
    parser.add_argument("--json", action="store_true", help="the answer as JSON")
    options = parser.parse_args(arguments)
    folder = folder_of(options.run)
    entry, edited = _opened(folder)
    if edited:
        return _tell_different(folder, edited, options.json)
    out = options.out or _free(folder.parent.parent / "replays" / entry.run_id)
    _refuse_used(out, folder)
    interrupt.install()
    members = members_of(entry, options.pack_size)
    configs = configs_of(entry, members, out.resolve())
    trained, changed = _train(entry, members, configs, out, ["replay", *arguments], tracking)
    if changed:
        return _tell_different(folder, changed, options.json)
    assert trained is not None
    if not options.verify:
        _say(f"trained again in {out / entry.run_id}; --verify compares it with {folder}")
        return 0
    found = compared((folder, entry), (out / entry.run_id, trained))
    return _tell(found, folder, out / entry.run_id, options.json)


def _opened(folder: Path) -> tuple[Record, list[str]]:
    """The record of a run, and why it is not what was trained; nothing where it is."""
    from lorabench import record
    from lorabench.config import ConfigErrors
    from lorabench.replay import why_another

    entry = record.read(folder)
    if entry is not None:
        if not entry.has_trained():
            raise ConfigErrors(
                f"RUN: must have been trained to its end; '{folder}' is {entry.status}"
            )
        return entry, why_another(folder, entry.config)
    try:
        content: Any = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        entry = record.Record.model_validate(content)
    except (OSError, ValueError) as error:
        raise ConfigErrors(
            f"RUN: must be a folder with a record.json; '{folder}': {error}"
        ) from None
    edited = why_another(folder, entry.config)
    return entry, [*edited, "record.json is not what was written: its checksum is another"]


def _free(path: Path) -> Path:
    """A folder that does not exist yet, numbered from the second on."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def _refuse_used(out: Path, folder: Path) -> None:
    from lorabench.config import ConfigErrors

    if out.exists() and any(out.iterdir()):
        raise ConfigErrors(f"--out: must be a new or an empty folder; '{out}' has content")
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigErrors(f"--out: must not lie in the run's own folder; got '{out}'")


def _train(
    entry: Record,
    members: list[str],
    configs: list[dict[str, Any]],
    out: Path,
    words: list[str],
    tracking: Any,
) -> tuple[Record | None, list[str]]:
    """Train one run of a pack; return its record, or what its sources are not any more."""
    from omegaconf import OmegaConf

    from lorabench import plan
    from lorabench.config import ConfigErrors, typed
    from lorabench.progress import Display
    from lorabench.sweep import Job, SweepFolder, entry_of

    planner = plan.Planner()
    jobs = []
    for run, content in zip(members, configs, strict=True):
        config = typed(OmegaConf.create(content))
        if errors := plan.check(config):
            raise ConfigErrors(errors)
        jobs.append(Job(config, run, planner.make(config)))
    mine = jobs[members.index(entry.run_id)]
    if changed := _changed(entry, mine.plan):
        return None, changed
    folder = SweepFolder(out)
    compiled = members if (entry.plan.get("pack") or {}).get("compiled") else []
    folder.add({job.plan.run_id: entry_of(job) for job in jobs}, [members], words, compiled)
    from lorabench.worker import Shared, Worker  # heavy: after all mistakes were told

    display = Display(1, mine.config.trainer.num_steps)
    shared = Shared(planner, words)
    shared.check_data([mine])
    worker = Worker(folder, [mine], shared, display, scores_base=False)
    with tracking.of_command(), display:
        outcome = worker.finish(mine)
    trained = mine.record()
    if trained is None or not trained.has_trained():
        raise ConfigErrors(f"RUN: must train again; it {outcome.status}: {outcome.error}")
    return trained, []


def _changed(entry: Record, planned: Any) -> list[str]:
    """Why a record does not resolve to its own id any more."""
    if planned.run_id == entry.run_id:
        return []
    before = entry.plan.get("contents", {})
    found = [
        f"{what}: {before[name][:12]} when it was trained, {planned.contents[name][:12]} now"
        for name, what in CONTENTS.items()
        if name in before and name in planned.contents and before[name] != planned.contents[name]
    ]
    told = f"the record resolves to run {planned.run_id}, not to {entry.run_id}"
    return [*found, told]


def _say(text: str) -> None:
    from lorabench.show.text import console

    console().print(text, soft_wrap=True)


def _tell_different(folder: Path, lines: list[str], as_json: bool) -> int:
    from lorabench import show
    from lorabench.replay import Compared

    found = Compared("different", [f"not the same: {line}" for line in lines], inputs=lines)
    if as_json:
        show.dump(_content(found, folder, None))
        return 1
    for line in [*found.lines, f"different: {folder} cannot be trained again as it was"]:
        _say(line)
    return 1


def _tell(found: Compared, folder: Path, again: Path, as_json: bool) -> int:
    from lorabench import show

    if as_json:
        show.dump(_content(found, folder, again))
    else:
        for line in found.lines:
            _say(line)
        _say(f"{found.answer}: {folder} and {again}")
    return 1 if found.answer == "different" else 0


def _content(found: Compared, folder: Path, again: Path | None) -> dict[str, Any]:
    return {
        "answer": found.answer, "run": str(folder), "again": None if again is None else str(again),
        "inputs": found.inputs, "shape": found.shape, "first_difference": found.first,
        "largest_difference": found.drift, "lines": found.lines,
    }  # fmt: skip


def diff(arguments: list[str]) -> int:
    """lorabench diff RUN RUN [--json]"""
    from lorabench import record, show
    from lorabench.config import ConfigErrors
    from lorabench.replay import compared, differing
    from lorabench.runs import folder_of

    parser = Parser(prog="lorabench diff", description=VERBS["diff"])
    parser.add_argument(
        "runs", metavar="RUN", nargs=2, help="folder of a run, or its id's beginning"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(arguments)
    folders = [folder_of(word) for word in options.runs]
    entries = []
    for folder in folders:
        if (entry := record.read(folder)) is None:
            raise ConfigErrors(f"RUN: must be a folder with a whole record.json; got '{folder}'")
        entries.append(entry)
    found = compared((folders[0], entries[0]), (folders[1], entries[1]))
    keys = differing(*entries)
    if options.json:
        show.dump({
            "config": keys["config"], "results": keys["results"], "inputs": found.inputs,
            "stack": found.shape, "first_difference": found.first,
        })  # fmt: skip
        return 0
    for key, (one, other) in keys["config"].items():
        _say(f"config   {key}: {one!r}, then {other!r}")
    for text in found.inputs:
        _say(f"data     {text.replace(', now ', ', then ')}")
    for text in found.shape:
        _say(f"stack    {text.replace(', now ', ', then ')}")
    if found.first is not None:
        step, one, other = found.first
        _say(f"losses   first differ at step {step}: {one:.6g}, then {other:.6g}")
    for key, (one, other) in keys["results"].items():
        _say(f"result   {key}: {one:.6g}, then {other:.6g}")
    if not any((keys["config"], found.inputs, found.shape, found.first, keys["results"])):
        _say("nothing differs")
    return 0
