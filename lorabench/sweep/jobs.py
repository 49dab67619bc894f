"""The runs of one command: all of them planned, or all their errors at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from lorabench import config as configs
from lorabench import masking, plan, record
from lorabench.config import Config, ConfigErrors


@dataclass
class Job:
    """One run of the command, planned."""

    config: Config
    label: str  # the overrides that tell it from the others
    plan: plan.Plan

    @property
    def folder(self) -> Path:
        return Path(self.plan.folder)

    def record(self) -> record.Record | None:
        """What is recorded of the run; None while it is only planned."""
        return record.read(self.folder)

    def check_folder(self) -> None:
        """Refuse a folder that cannot be written to, unless the run has ended in it.

        Raises:
            ConfigErrors: the folder, and what is wrong with it.
        """
        if refused := plan.check_folder(self.folder, "output_dir"):
            found = self.record()
            if found is None or found.evaluation(self.plan.evaluation_id) is None:
                raise ConfigErrors(refused)


def plan_jobs(
    composed: list[DictConfig], labels: list[str], planner: plan.Planner | None = None
) -> list[Job]:
    """Plan every run; nothing is loaded but names and shapes.

    Raises:
        ConfigErrors: everything wrong with any of them, each error once.
    """
    if not composed:
        raise ConfigErrors("command line: must ask for at least one run; got none; correct a sweep")
    planner = planner or plan.Planner()
    labels = distinct(masking.mask(labels))
    mistakes = Mistakes(len(composed))
    jobs: list[Job] = []
    typed: list[tuple[Config, str]] = []
    for cfg, label in zip(composed, labels, strict=True):
        with mistakes.of(label):
            config = configs.typed(cfg)
            if found := plan.check(config):
                raise ConfigErrors(found)
            typed.append((config, label))
    mistakes.refuse()
    for config, label in typed:
        with mistakes.of(label):
            jobs.append(Job(planner.resolved(config), label, planner.make(config)))
            jobs[-1].check_folder()
    mistakes.refuse()
    return jobs


def distinct(labels: list[str]) -> list[str]:
    """The overrides that tell the runs of a command apart; those they share left out."""
    words = [label.split() for label in labels]
    common = set(words[0]).intersection(*words[1:]) if len(words) > 1 else set()
    return [" ".join(word for word in label if word not in common) or "defaults" for label in words]


def first_of_each(jobs: Iterable[Job]) -> list[Job]:
    """One job per run, in order: grid points may be the same run in other words."""
    found: dict[str, Job] = {}
    for job in jobs:
        found.setdefault(job.plan.run_id, job)
    return list(found.values())


class Mistakes:
    """Collects what is wrong with the runs of a command."""

    def __init__(self, total: int):
        self.total = total  # runs of the command
        self.found: dict[str, list[str]] = {}  # an error, and the labels of the runs it is about

    @contextmanager
    def of(self, *labels: str) -> Iterator[None]:
        """Collect the errors raised in this block as errors of these runs."""
        try:
            yield
        except ConfigErrors as refused:
            for error in refused.errors:
                self.found.setdefault(error, []).extend(labels)

    def refuse(self) -> None:
        """Raise all collected errors, if any.

        Raises:
            ConfigErrors: each error once.
        """
        if self.found:
            raise ConfigErrors(self.found, self.found, self.total)
