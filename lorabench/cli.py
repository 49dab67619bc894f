"""The command line: one verb a function, heavy imports inside.

Only this room and the launcher know Hydra.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERBS = {
    "train": "train one run, or a sweep with -m",
    "plan": "show and check what train would do; trains nothing",
    "runs": "list every run of a sweep and its status",
    "compare": "table of a sweep: one row a setting, spread over seeds",
}
EXAMPLES = """\
examples:
  lorabench train                                   one run on the embedded base, seconds
  lorabench train -m head=exclude,lora lora.r=16,32 four runs
  lorabench compare outputs/default                 their table
  lorabench plan -m experiment=lm_head              what a sweep will do
  lorabench train --cfg job                         every key and its value
"""


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
        "runs": runs,
        "compare": compare,
    }
    if verb not in handlers:
        from lorabench.config import did_you_mean

        return _fail(
            [
                f"lorabench: the first word must be one of {', '.join(VERBS)}; "
                f"got {did_you_mean(verb, VERBS)}"
            ]
        )
    return _guarded(lambda: handlers[verb](arguments[1:]))


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


def _fail(lines: list[str], code: int = 2) -> int:
    for line in lines:
        print(line, file=sys.stderr)
    return code


def _guarded(act: Callable[[], int]) -> int:
    """Run a verb; mistakes become lines on stderr, a traceback only with HYDRA_FULL_ERROR=1."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises to us instead of printing and exiting
    try:
        return act()
    except KeyboardInterrupt:
        return _fail(["interrupted; the same command continues where it stopped"], 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        if wants_traceback:
            raise
        lines = _explain(error)
        if lines is None:
            first = (str(error).strip().splitlines() or [""])[0]
            lines = [
                f"lorabench: {type(error).__name__}: {first}",
                "This is a defect of lorabench or of a library; HYDRA_FULL_ERROR=1 shows where.",
            ]
        return _fail(lines)
    finally:
        if not wants_traceback:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _explain(error: BaseException) -> list[str] | None:
    """The user's mistake behind an exception, one line each; None where there is none."""
    import re

    from lorabench.config import ConfigErrors, did_you_mean, keys

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, ConfigErrors):
            return link.errors
    import hydra.errors
    import omegaconf.errors

    text = "\n".join(str(link) for link in chain)
    found = re.search(
        r"Could not find '([\w\-./]+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t\S+)+)", text
    )
    if found:
        group, name, options = found[1], found[2], found[3].split()
        return [f"{group}: must be one of {', '.join(options)}; got {did_you_mean(name, options)}"]
    found = re.search(
        r"Could not (?:override|append to config\. An item is already at|delete from config\.)"
        r" '([^']+)'",
        text,
    )
    if found and "not in" in text:
        key = found[1]
        return [
            f"{key}: no such key; got {did_you_mean(key, keys())}; "
            "`lorabench train --cfg job` prints all keys"
        ]
    found = re.search(r"In '[^']+': Could not find '([^']+)'", text)
    if found:
        return [
            f"{found[1]}: no such group or file; "
            "`lorabench train --info defaults-tree` shows what there is"
        ]
    if isinstance(error, (hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException)):
        shown = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = error.__cause__
        if cause is not None and str(cause).strip() and str(cause).splitlines()[0] not in shown:
            shown.append(str(cause).splitlines()[0].strip())
        key = re.search(r"full_key: (\S+)", text)
        if key:
            shown = [line for line in shown if "full_key" not in line and "object_type" not in line]
            reason = shown[-1] if len(shown) > 1 else shown[0]
            return [f"{key[1]}: {reason}"]
        return [" ".join(shown[:3])]
    return None


# --- Hydra -----------------------------------------------------------------------------------


def conf_folder() -> str:
    """conf/ of a checkout, or the copy inside an installed package."""
    package = Path(__file__).parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def register() -> None:
    """Make the schema and the run-id resolver known to Hydra."""
    from omegaconf import DictConfig, OmegaConf

    from lorabench import config
    from lorabench import plan as planning

    def resolve(*, _root_: DictConfig) -> str:
        parsed = config.typed(_root_)
        errors = planning.check(parsed)
        if errors:
            raise config.ConfigErrors(errors)
        return planning.run_id(parsed)

    config.register()
    OmegaConf.register_new_resolver("run_id", resolve, replace=True)


class Train:
    """The task Hydra runs: one config alone, or packs under the packed launcher."""

    __module__ = "lorabench.cli"

    def __init__(self) -> None:
        self.outcomes: list[Any] = []
        self.jobs: list[Any] = []

    def __call__(self, cfg: Any) -> dict[str, Any]:
        """One run by itself, or under another launcher than packed."""
        from hydra.core.hydra_config import HydraConfig

        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        kept, packs = self.plan([cfg], [" ".join(overrides) or "defaults"])
        return kept[0] if kept else self.run(packs[0])[0]

    def plan(
        self, configs: list[Any], labels: list[str], pack_size: int = 1
    ) -> tuple[dict[int, dict[str, Any]], list[list[int]]]:
        """All jobs planned: results kept from earlier commands, and packs of those to train."""
        import dataclasses

        from lorabench import sweep

        self.jobs = sweep.plan_jobs(configs, labels)
        kept, todo = {}, []
        first: dict[str, int] = {}
        for i, job in enumerate(self.jobs):
            outcome = sweep.earlier(job)
            if outcome is not None:
                kept[i] = dataclasses.asdict(outcome)
                self.outcomes.append(outcome)
            elif job.plan.run_id not in first:
                first[job.plan.run_id] = i
                todo.append(i)
            else:  # two grid points that are the same run
                outcome = sweep.Outcome(
                    job.plan.run_id, job.label, "finished", job.plan.folder, kept=True
                )
                kept[i] = dataclasses.asdict(outcome)
        self._display(todo)
        return kept, self._packs(todo, pack_size)

    def _packs(self, todo: list[int], limit: int) -> list[list[int]]:
        """Which of the jobs to train do so together."""
        from lorabench import machine, sweep

        if not todo:
            return []
        jobs = [self.jobs[i] for i in todo]
        memory = machine.free_memory(machine.choose_device(jobs[0].config.trainer.device))
        return [[todo[i] for i in pack] for pack in sweep.form_packs(jobs, limit, memory)]

    def _display(self, todo: list[int]) -> None:
        from lorabench.progress import Display

        self.display = Display(len(todo), sum(self.jobs[i].config.trainer.steps for i in todo))
        if len(self.jobs) > len(todo):
            self.display.say(
                f"{len(self.jobs) - len(todo)} of {len(self.jobs)} runs are kept from before, "
                f"{len(todo)} to train"
            )

    def run(self, members: list[int]) -> list[dict[str, Any]]:
        """Train one pack."""
        import dataclasses

        from lorabench import runner

        with self.display:
            outcomes = runner.run_pack([self.jobs[i] for i in members], self.display)
        self.outcomes += outcomes
        return [dataclasses.asdict(outcome) for outcome in outcomes]


def train(arguments: list[str]) -> int:
    """lorabench train [-m] OVERRIDES"""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import hydra

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    register()
    task = Train()
    function = _function(task)
    # argparse refuses overrides on both sides of a flag, which `plan` takes
    flags = [a for a in arguments if a in ("-m", "--multirun")]
    sys.argv = ["lorabench", *flags[:1], *(a for a in arguments if a not in flags)]
    hydra.main(config_path=conf_folder(), config_name="train", version_base="1.3")(function)()
    return _closing(task.outcomes)


def _function(task: Train) -> Callable[[Any], Any]:
    """A plain function, which Hydra wants, carrying the packed launcher's two calls."""

    def train_task(cfg: Any) -> Any:
        return task(cfg)

    train_task.plan = task.plan  # type: ignore[attr-defined]
    train_task.run = task.run  # type: ignore[attr-defined]
    return train_task


def _closing(outcomes: list[Any]) -> int:
    """The last lines of a command, and its exit code."""
    if not outcomes:
        return 0  # --cfg, --info, ...: Hydra has printed what was asked for
    folders = {str(Path(outcome.folder).parent) for outcome in outcomes}
    bad = [outcome for outcome in outcomes if outcome.status in ("failed", "running")]
    for outcome in outcomes:
        if outcome.status == "stopped":
            print(f"{outcome.label}: {outcome.error} ({outcome.folder})", file=sys.stderr)
    if bad:
        lines = [f"{len(bad)} of {len(outcomes)} runs did not finish:"]
        lines += [f"  {o.label or 'run'} ({o.folder}): {o.status}: {o.error}" for o in bad]
        return _fail(lines, 1)
    for folder in sorted(folders):
        print(
            f"{folder}: {len(outcomes)} of {len(outcomes)} runs done; lorabench compare {folder}",
            file=sys.stderr,
        )
    return 0


def compose(arguments: list[str]) -> tuple[list[Any], list[str]]:
    """Every config of a command line with its label, as a multirun would make them.

    Uses Hydra's own parser and its basic sweeper's product, so `plan` shows what `train` does.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    multirun = any(a in ("-m", "--multirun") for a in arguments)
    overrides = [a for a in arguments if a not in ("-m", "--multirun")]
    register()
    with initialize_config_dir(conf_folder(), version_base="1.3", job_name="plan"):
        if not multirun:
            return [hydra_compose("train", overrides)], [" ".join(overrides) or "defaults"]
        fixed = [
            o
            for o in OverridesParser.create().parse_overrides(overrides)
            if not o.is_sweep_override()
        ]
        whole = hydra_compose(
            "train", [o.input_line for o in fixed if o.input_line], return_hydra_config=True
        )
        params = whole.hydra.sweeper.params or {}
        lines = [f"{key}={value}" for key, value in params.items()] + overrides
        parsed = OverridesParser.create().parse_overrides(lines)
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
        return [hydra_compose("train", job) for job in jobs], [" ".join(job) for job in jobs]


# --- the other verbs -------------------------------------------------------------------------


def plan(arguments: list[str]) -> int:
    """lorabench plan [-m] [--json] OVERRIDES"""
    from hydra_plugins.lorabench_launcher.packed_launcher import PackedLauncherConf
    from lorabench import machine, show, sweep

    as_json = "--json" in arguments
    if "-h" in arguments or "--help" in arguments:
        print(
            "lorabench plan [-m] [--json] KEY=VALUE ...\n\n"
            "what `lorabench train` with the same words would do"
        )
        return 0
    jobs = sweep.plan_jobs(*compose([a for a in arguments if a != "--json"]))
    memory = machine.free_memory(machine.choose_device(jobs[0].config.trainer.device))
    packs = sweep.form_packs(jobs, PackedLauncherConf.pack_size, memory)
    show.plan(jobs, packs, as_json)
    return 0


def _folder_parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lorabench {verb}", description=VERBS[verb])
    parser.add_argument("folder", type=Path, help="folder of a sweep, such as outputs/lm_head")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


def _records(folder: Path) -> list[Any]:
    from lorabench import record
    from lorabench.config import ConfigErrors

    if not folder.is_dir():
        near = [str(p) for p in sorted(folder.parent.glob("*/")) if any(p.glob("*/record.json"))]
        has = f"; sweeps there: {', '.join(near)}" if near else ""
        raise ConfigErrors(f"folder: must be the folder of a sweep; '{folder}' does not exist{has}")
    found = list(record.find(folder))
    if not found:
        raise ConfigErrors(
            f"folder: must hold runs (folders with record.json); '{folder}' has none; "
            f"`lorabench train` makes them"
        )
    return found


def runs(arguments: list[str]) -> int:
    """lorabench runs FOLDER [--json]"""
    from lorabench import show

    options = _folder_parser("runs").parse_args(arguments)
    show.runs(_records(options.folder), options.json)
    return 0


def compare(arguments: list[str]) -> int:
    """lorabench compare FOLDER [--json]"""
    from lorabench import compare as comparing
    from lorabench import show

    options = _folder_parser("compare").parse_args(arguments)
    table = comparing.table([record for _, record in _records(options.folder)])
    show.comparison(table, options.folder, options.json)
    return 0
