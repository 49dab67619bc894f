"""The run an export starts from: finished, on the base it was trained on.

Imports without torch: what is wrong with a command shows at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench import data, intact, record, tasks
from lorabench import model as base_model
from lorabench.config import (
    Config,
    ConfigErrors,
    DataConfig,
    ModelConfig,
    and_more,
    nearest,
    typed,
)
from lorabench.hashes import file_hash

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Run:
    """A finished run."""

    folder: Path
    entry: record.Record
    config: Config
    base: str | None = None  # where its base is now; None: where the record says

    @property
    def model(self) -> ModelConfig:
        """Where the base is; a hub base at the very commit the run had."""
        commit = self.entry.provenance["revision"]
        path = self.base or self.config.model.path
        return base_model.findable(
            dataclasses.replace(self.config.model, path=path, revision=commit or None)
        )

    @property
    def template(self) -> str | None:
        """The chat template that the run was trained with; None: none, or an older record."""
        path = self.folder / "adapter" / data.TEMPLATE_FILE
        return path.read_text(encoding="utf-8") if path.is_file() else None

    @property
    def data_settings(self) -> DataConfig:
        """How the run's data became tokens, with the template that lies beside its adapter."""
        settings = self.config.data
        if not isinstance(settings.chat_template, str) or self.template is None:
            return settings
        saved = self.folder / "adapter" / data.TEMPLATE_FILE
        return dataclasses.replace(settings, chat_template=str(saved))

    @property
    def auto_class(self) -> Any:
        """The transformers class that loads base and merged folder."""
        import transformers

        return getattr(transformers, tasks.AUTO_CLASSES[self.config.task])

    @property
    def auto_options(self) -> dict[str, Any]:
        """What a config must say of a classification: its labels, in the order of the head."""
        labels = self.entry.plan.get("labels")
        if not labels:
            return {}
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }

    @property
    def stored_dtype(self) -> str:
        """The dtype of the base's weights, as far as a folder is written in it."""
        name = self.config.model.dtype
        return name if name in DTYPES else "float32"


def open_run(folder: Path, base: str | None = None) -> Run:
    """The run in a folder.

    Args:
        base: where its base is now; None: where the record says.
    Raises:
        ConfigErrors: no run there, or one that has not finished (names the nearest), or one whose
            adapter is damaged.
    """
    from omegaconf import OmegaConf

    entry = record.read(folder)
    if entry is None:
        raise ConfigErrors(
            f"RUN: must be the folder of a run (with record.json); {_what_is(folder)}"
            f"{_finished_near(folder)}"
        )
    if entry.status != "finished":
        why = f" ({entry.error})" if entry.error else ""
        raise ConfigErrors(
            f"RUN: must have finished; '{folder}' is {entry.status}{why}{_finished_near(folder)}"
        )
    damaged = intact.damage(folder, entry, file_hash)
    if damaged := intact.of_adapter(damaged):
        told = intact.described_damage(folder, entry, damaged)
        raise ConfigErrors(f"RUN: must hold the adapter that was trained; {told}")
    return Run(folder, entry, typed(OmegaConf.create(entry.config)), base)


def _what_is(folder: Path) -> str:
    if not folder.exists():
        return f"'{folder}' does not exist"
    if (folder / "record.json").exists():
        return f"'{folder / 'record.json'}' is no record"
    return f"'{folder}' has none"


def _finished_near(folder: Path) -> str:
    """The finished runs in a sweep's folder, or beside a run's, nearest name first."""
    place = folder
    while not place.is_dir() and place != place.parent:
        place = place.parent
    for level in (place, place.parent):
        names = [
            path.name
            for path, entry in record.find(level)
            if entry.status == "finished" and path != folder
        ]
        if names:
            close = nearest(folder.name, names, 3)
            others = [name for name in names if name not in close]
            return f"; finished in {level}: {and_more([*close, *others], 3)}"
    return ""


def check_base(run: Run, with_tokenizer: bool = False) -> None:
    """Refuse a base that is not, byte for byte, the one the run was trained on.

    Args:
        with_tokenizer: its tokenizer must be the same too; old records do not tell.
    """
    if not run.entry.provenance["hub"]:
        _must_be_there(run)
    errors = base_model.check(run.model)
    if errors:
        raise ConfigErrors(errors)
    now = base_model.identity(run.model)
    parts = ["hub", "revision", "weights"]
    if with_tokenizer and "tokenizer" in run.entry.provenance:
        parts.append("tokenizer")
    for key in parts:
        then = run.entry.provenance[key]
        if now[key] != then:
            raise ConfigErrors(
                f"model.path: must be the base run {run.entry.run_id} was trained on, {key} "
                f"{then or 'none'}; '{run.model.path}' has {now[key] or 'none'}; put that base "
                f"back in its place, or give its place with model.path=FOLDER"
            )


def _must_be_there(run: Run) -> None:
    """Refuse a folder that is gone, or relative to another one: its name could be a hub id."""
    where = base_model.location(run.model)
    if not Path(where).is_dir():
        raise ConfigErrors(
            f"model.path: must be the folder that run {run.entry.run_id} was trained on; there is "
            f"no folder '{where}', seen from {Path.cwd()}; give its place with model.path=FOLDER"
        )


def check_path(path: Path) -> None:
    """Refuse a place where something is: an export never overwrites."""
    if path.is_dir() and any(path.iterdir()):
        raise ConfigErrors(
            f"PATH: must not exist or be an empty folder; '{path}' holds "
            f"{len(list(path.iterdir()))} files; give another"
        )
    if path.exists() and not path.is_dir():
        raise ConfigErrors(
            f"PATH: must not exist or be an empty folder; '{path}' is a file; give another"
        )
