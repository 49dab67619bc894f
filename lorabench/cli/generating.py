"""The verb that lets saved adapters write: generate."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench import imports
from lorabench.cli.telling import Parser, tell
from lorabench.cli.verbs import VERBS

if TYPE_CHECKING:
    from lorabench.export.source import Run
    from lorabench.record import Record

HELP = """\
--prompt may be repeated. FILE holds one prompt per line; in FILE.jsonl each line is an object with
the key "prompt", which may hold line breaks. With data.chat_template=true a prompt is the user's
turn; else it is what the model continues, so write it as the training prompts are written.
exit code 0: done; 1: an adapter is damaged and was left out; 2: refused"""


@dataclass
class Chosen:
    """A run that is asked, and what tells it from the others."""

    run: Run
    setting: dict[str, object]  # the keys in which the runs of the command differ
    seed: int


def generate(arguments: list[str]) -> int:
    """lorabench generate DIR ... --prompt TEXT [--file FILE] [--max-new-tokens N] [--json]"""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = Parser(prog="lorabench generate", description=VERBS["generate"], epilog=HELP)
    parser.add_argument(
        "folders", type=Path, metavar="DIR", nargs="+",
        help="folder of a sweep, or of one run, or the beginning of a run's id",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="what to answer"
    )
    parser.add_argument("--file", type=Path, metavar="FILE", help="a file of prompts")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help="tokens per answer, at most; default: the runs' data.answer_max_new_tokens",
    )  # fmt: skip
    parser.add_argument(
        "--all-seeds", action="store_true", help="not only the first seed of each setting"
    )
    parser.add_argument("--device", help="auto, cuda, cuda:N, mps or cpu; default: the runs' own")
    parser.add_argument("--json", action="store_true", help="the answers as JSON")
    options = parser.parse_intermixed_args(arguments)  # --prompt TEXT DIR

    from lorabench.config import ConfigErrors

    most = options.max_new_tokens
    if most is not None and most < 1:
        raise ConfigErrors(f"--max-new-tokens: must be at least 1; got {most}; leave it out")
    prompts = [*options.prompt, *(read_prompts(options.file) if options.file else [])]
    if not prompts:
        raise ConfigErrors("--prompt: must give something to answer; give it, or --file")
    chosen = choose(options.folders, options.all_seeds, options.device)
    chosen, notes = _writers(chosen)
    _check(chosen)

    with imports.heavy():
        from lorabench import generation, show

    groups = generation.grouped([one.run for one in chosen], prompts, most)
    if not options.json:
        tell([*notes, *_notes(chosen)])
    written = generation.write(groups)
    labels = {one.run.folder: one for one in chosen}
    show.answers(prompts, written, labels, options.json)
    damaged = [line for group in written for line in group.damaged.values()]
    return tell([] if options.json else damaged, 1 if damaged else 0)


def read_prompts(path: Path) -> list[str]:
    """Read prompts: one per line, or the key "prompt" of each line of a .jsonl file.

    Raises:
        ConfigErrors: no such file, no text, a line that is no object with a prompt, no prompt.
    """
    from lorabench.config import ConfigErrors

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigErrors(
            f"--file: must be a file of prompts; '{path}': {error.strerror}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigErrors(
            f"--file: must be UTF-8; '{path}' is not, at byte {error.start}; convert it with iconv"
        ) from None
    found: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append(line)
            continue
        try:
            prompt = json.loads(line)["prompt"]
            prompt.encode()  # fails on what is no text, and on half a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigErrors(
                f'--file: every line must be an object such as {{"prompt": "text"}}; line {number} '
                f"of '{path}' is {line!r:.60}; correct it"
            ) from None
        found.append(prompt)
    if not found:
        raise ConfigErrors(f"--file: must hold prompts; '{path}' has none; write one per line")
    return found


def choose(places: Sequence[Path], all_seeds: bool, device: str | None = None) -> list[Chosen]:
    """Return the trained runs of sweep folders and run folders, in the order of their settings.

    Args:
        all_seeds: of a sweep folder; else the first seed of each setting that has an adapter. A
            run that is named itself is always among them.
        device: takes the place of trainer.device.
    Raises:
        ConfigErrors: a folder without trained runs, a run that is not trained.
    """
    from omegaconf import OmegaConf

    from lorabench import compare
    from lorabench.compare.tables import order
    from lorabench.config import ConfigErrors, typed
    from lorabench.export.source import Run

    found: dict[Path, Record] = {}
    named: set[Path] = set()
    errors: list[str] = []
    for place in places:
        try:
            runs, is_run = _trained(place)
        except ConfigErrors as error:
            errors += error.errors
            continue
        found |= runs
        named |= set(runs) if is_run else set()
    if errors:
        raise ConfigErrors(errors)
    table = compare.table(list(found.values()))
    chosen: list[Chosen] = []
    for (folder, entry), row in zip(found.items(), table["runs"], strict=True):
        config = typed(OmegaConf.create(entry.config))
        if device is not None:
            trainer = dataclasses.replace(config.trainer, device=device)
            config = dataclasses.replace(config, trainer=trainer)
        chosen.append(Chosen(Run(folder, entry, config), row["setting"], config.seed))
    chosen.sort(
        key=lambda one: (
            [order(one.setting[key]) for key in table["varied"]],
            one.seed,
            sorted(one.run.entry.seeds.items()),
        )
    )
    if all_seeds:
        return chosen
    first: dict[str, Path] = {}
    for one in chosen:
        first.setdefault(repr(one.setting), one.run.folder)
    return [one for one in chosen if one.run.folder in {*first.values(), *named}]


def _trained(place: Path) -> tuple[dict[Path, Record], bool]:
    """Return the trained runs of a folder, and whether it is that of one run."""
    from lorabench import record
    from lorabench.config import ConfigErrors
    from lorabench.runs import folder_of

    folder = folder_of(place, must_exist=False).resolve()
    is_run = (folder / "record.json").is_file()
    there = dict(record.find(folder))
    trained = {path: entry for path, entry in there.items() if entry.has_trained()}
    if trained:
        return trained, is_run
    if not folder.is_dir():
        got = f"'{place}' does not exist"
    elif there:
        got = f"'{place}' has {' and '.join(sorted({one.status for one in there.values()}))} runs"
    else:
        got = f"'{place}' has no run"
    raise ConfigErrors(
        f"DIR: must hold a run with a saved adapter; {got}; `lorabench train` makes them"
    )


def _writers(chosen: Sequence[Chosen]) -> tuple[list[Chosen], list[str]]:
    """Return the runs that can write, and what to say about classifiers among them.

    Raises:
        ConfigErrors: all are classifiers.
    """
    from lorabench.config import ConfigErrors, and_more

    classifiers = [one.run.entry.run_id for one in chosen if one.run.config.task != "causal_lm"]
    if len(classifiers) == len(chosen):
        raise ConfigErrors(
            f"task: must be causal_lm to write text; {and_more(classifiers)} classify; "
            f"`lorabench evaluate` scores them"
        )
    left_out = [f"left out, for they classify: {and_more(classifiers, 3)}"] if classifiers else []
    return [one for one in chosen if one.run.entry.run_id not in classifiers], left_out


def _check(chosen: Sequence[Chosen]) -> None:
    """Refuse devices that are not there, and bases that are not those of the runs."""
    from lorabench import machine
    from lorabench.config import ConfigErrors
    from lorabench.export import source

    errors: list[str] = []
    bases: dict[str, Run] = {}
    for one in chosen:
        config, origin = one.run.config, one.run.entry.provenance
        errors += machine.check_device(config.trainer.device)
        parts = [origin.get(name) for name in ("hub", "revision", "weights", "tokenizer")]
        bases.setdefault(repr((config.model, parts)), one.run)
    for run in bases.values():
        try:
            source.check_base(run, with_tokenizer=True)
        except ConfigErrors as error:
            errors += error.errors
    if errors:
        raise ConfigErrors(errors)


def _notes(chosen: Sequence[Chosen]) -> list[str]:
    """Say what a reader of the answers should know about how the prompts are read."""
    from lorabench.config.parts import GENERATED

    templates = {
        one.run.config.data.prompt
        for one in chosen
        if one.run.config.data.source not in GENERATED and not one.run.config.data.chat_template
    }
    return [
        f"note: the runs were trained on prompts of the form {template!r}; --prompt is the whole "
        f"prompt"
        for template in sorted(templates)
        if not (template.startswith("{") and template.find("}") == len(template) - 1)
    ]
