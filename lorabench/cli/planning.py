"""The verb plan: what train would do, and what the sweep would be able to tell."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.cli import presets
from lorabench.cli.composing import compose, register, say_if_sweep
from lorabench.cli.telling import Parser, above_zero, nowhere, whole_number
from lorabench.cli.training import SHOWS, run_hydra
from lorabench.cli.words import refuse_flags

if TYPE_CHECKING:
    from lorabench.compare.outlook import Outlook, Spreads
    from lorabench.sweep import Job
    from lorabench.worker import Shared

FLAGS = ("--json", "--smoke", "--pilot", "--settle", "--show")
HELP = """\
lorabench plan [-m] [--json] [--smoke] [--pilot DIR] [--settle X] [--show N] KEY=VALUE ...

what `lorabench train` with the same words would do, how long it takes, and the smallest
difference it could find

--json       the same for programs, with every adapted module; refusals too
--smoke      also two steps of every pack on two examples, in each of its stages, and
             its adapters reloaded
--pilot DIR  an earlier sweep tells how much runs differ over seeds and examples
--settle X   the seeds, examples and hours that a difference of X needs to be found
--show N     also the first N training examples as the model sees them, with special tokens
             and what carries a loss, and how long the examples are

exit code 0: it can be trained; 1: --smoke failed; 2: refused"""


def split(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the verb's own options, and the words for Hydra.

    Raises:
        ConfigErrors: an option without its value.
    """
    parser = Parser("lorabench plan", add_help=False, allow_abbrev=False,
                    usage="lorabench plan [-m] [OPTIONS] KEY=VALUE ...")  # fmt: skip
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--pilot", type=Path, metavar="DIR")
    parser.add_argument("--settle", type=above_zero, metavar="X")
    parser.add_argument("--show", type=whole_number, metavar="N", default=0)
    return parser.parse_known_args(arguments)


def plan(arguments: list[str]) -> int:
    """lorabench plan [-m] [--json] [--smoke] [--pilot DIR] [--settle X] [--show N] OVERRIDES"""
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    options, words = split(arguments)
    refuse_flags("plan", words, FLAGS)
    if SHOWS.intersection(words):
        register()
        run_hydra(lambda _: None, words)  # prints what was asked for
        return 0
    from lorabench import machine, show, sweep
    from lorabench.config import ConfigErrors
    from lorabench.data.sources import remote_paths
    from lorabench.plan import Planner
    from lorabench.sweep.needs import Needs

    spreads = _spreads(options.pilot)  # a folder that tells nothing is refused at once
    planner = Planner()
    composed = compose(words, planner)
    if not composed.is_sweep:
        say_if_sweep(composed.hydra)
    planned = sweep.plan_jobs(composed.configs, composed.labels, planner)
    jobs = sweep.first_of_each(planned)
    from lorabench.worker import Shared  # heavy: after all mistakes were told

    shared, unread = Shared(planner), ""
    notes = presets.note(job.config for job in jobs)
    try:
        notes += shared.check_data(jobs)
    except ConfigErrors as error:
        # A hub may be out of reach; what is wrong with files here is refused, as by `train`.
        if options.smoke or options.show or not all(remote_paths(job.config.data) for job in jobs):
            raise
        unread = error.errors[0]
    device = machine.choose_device(jobs[0].config.trainer.device)
    memory = machine.free_memory(device)
    needs = Needs(planner)
    needs.know(jobs)
    trained = {i for i, job in enumerate(jobs) if (found := job.record()) and found.has_trained()}
    sweep.check_memory([job for i, job in enumerate(jobs) if i not in trained], needs)
    packs = sweep.form_packs(jobs, composed.pack_size, memory, needs)
    sweep.to_compile(jobs, packs, device, needs)  # refuses what cannot be
    faster = sweep.faster(jobs, packs, composed.pack_size, memory, needs)
    sweep.check_room([[jobs[i] for i in members if i not in trained] for members in packs])
    told = None if unread else _outlook(jobs, shared, spreads)
    attempts: list[Any] = []

    def tried() -> Iterator[Any]:
        from lorabench import smoke

        for members in packs:
            attempts.append(smoke.attempt([jobs[i] for i in members], shared))
            yield attempts[-1]

    if len(jobs) < len(planned) and not options.json:
        print(f"{len(planned)} grid points, {len(planned) - len(jobs)} the same run as another")
    smoked = tried() if options.smoke else ()
    seen = _examples(jobs[0], shared, options.show) if options.show else None
    show.plan(
        jobs, packs, needs, options.json, smoked, notes, unread, told, options.settle, seen, faster
    )
    return 1 if any(attempt.error is not None for attempt in attempts) else 0


def _examples(job: Job, shared: Shared, count: int) -> dict[str, Any]:
    """The first training examples of a run as the model sees them, and all lengths."""
    from lorabench.show import examples

    tokens = shared.dataset(job).tokens
    return {
        "examples": examples.content(tokens["train"], shared.tokenizer(job), count),
        "lengths": {split: examples.quantiles(found) for split, found in tokens.items()},
    }


def _spreads(pilot: Path | None) -> Spreads:
    """How much runs will differ: as in an earlier sweep, or as usual.

    Raises:
        ConfigErrors: the earlier sweep does not tell.
    """
    from lorabench.compare import outlook

    if pilot is None:
        return outlook.usual()
    from lorabench.cli.comparing import add_questions, asked_of
    from lorabench.cli.reading import records_of
    from lorabench.config import ConfigErrors

    nothing = argparse.ArgumentParser()
    add_questions(nothing)
    runs = records_of(pilot)
    asked = asked_of(nothing.parse_args([]), [pilot], runs, told=nowhere)
    found = outlook.of_pilot(asked.answers(runs), str(pilot))
    if found is None:
        raise ConfigErrors(
            f"--pilot: must be a sweep with two settings that share two seeds; '{pilot}' has none; "
            f"leave it out, or train one more seed there"
        )
    return found


def _outlook(jobs: Sequence[Job], shared: Shared, spreads: Spreads) -> Outlook | None:
    """What the runs will be able to tell; None: there is nothing to compare."""
    from lorabench.compare.outlook import outlook
    from lorabench.compare.tables import setting

    config = jobs[0].config
    examples = len(shared.dataset(jobs[0]).tokens["test"])
    if config.trainer.eval_examples is not None:
        examples = min(examples, config.trainer.eval_examples)
    runs = [(setting(dataclasses.asdict(job.config)), job.config.seed) for job in jobs]
    num_splits = 1 if config.data.retention.path is None else 2
    return outlook(runs, config.compare, examples, spreads, num_splits)
