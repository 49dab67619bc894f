"""config -> Plan: what a run will do, resolved and checked before anything trains.

Modules and counts are read off a skeleton of the base on the meta device, so no weights are loaded.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from lorabench import data, formats, identity, imports, machine, remarks, stages, start, versions
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, ModelConfig, model_name, recipe, scale
from lorabench.files import obstacle
from lorabench.lengths import Lengths
from lorabench.steps import Steps


class HeadPlan(BaseModel):
    """The output layer and what the head policy does to it."""

    policy: str
    module: str | None
    tied: bool
    consequence: str


class Plan(BaseModel):
    """What one run will do."""

    run_id: str
    evaluation_id: str
    evaluation: dict[str, Any]  # what decides the scores
    # Hashes of base, tokenizer, template, the examples of each split, and start_from.
    contents: dict[str, str]
    folder: str
    model: str
    lora_modules: list[str]
    saved_modules: list[str]
    trainable_parameters: int
    total_parameters: int
    scale: float  # what multiplies an update: lora_alpha / r, or lora_alpha / sqrt(r)
    scales: dict[str, float]  # of modules where a pattern gives another
    head: HeadPlan
    disk_bytes: int  # estimate: what the run folder will hold
    checkpoint_bytes: int  # estimate: what it holds beside that while the run trains
    tracker: str
    warnings: list[str]
    defaults: dict[str, Any] = {}  # recipe, what it gives (applied), what is set otherwise; or {}
    labels: list[str] = []  # of a classification: its classes, in the order of their numbers
    alone: str | None  # why the run cannot share a base forward; None: it packs
    padded: str | None = None  # why batches are padded; None: their examples lie end to end
    lengths: Lengths | None = None  # None: the data were not read
    exports: dict[str, str]  # adapter, merged, gguf: yes, or why not
    pack: dict[str, Any] = {}  # once it is formed: id, size, members


def check(config: Config) -> list[str]:
    """Errors found without loading anything: versions, device, where base, data and output are."""
    errors = versions.check(config) + machine.check_device(config.trainer.device)
    errors += base_model.attention_errors(config)
    errors += base_model.check(config.model) + data.check(config.data)
    errors += data.check_template(config.data)
    output = Path(config.output_dir)
    return errors + (
        check_folder(output, "output_dir")
        or check_folder(output / config.sweep, "sweep")
        or check_folder(output / config.sweep / ".locks", "sweep")
    )


def check_folder(folder: Path, key: str) -> list[str]:
    """Refuse a folder in which files cannot be written, or which cannot be made.

    Args:
        key: what says where it is.
    """
    found = obstacle(folder)
    if found is None:
        return []
    place, what = found
    return [
        f"{key}: must give a folder to write to; '{place}' {what}; correct that, or set another "
        f"{'sweep' if key == 'sweep' else 'output_dir'}=..."
    ]


class Resolved(NamedTuple):
    """What PEFT makes of a run's settings, learnt on a skeleton."""

    modules: list[str]  # that get an adapter
    trained: list[str]  # these, and modules that train a copy or a bias
    num_trainable: int  # parameters
    alone: str | None  # why the run cannot share a base forward
    left_out: list[str]  # what all-linear and the like do not adapt
    scales: dict[str, float]  # what multiplies each module's update, patterns included
    ranks: dict[str, int]


class Planner:
    """Plans the runs of one command; skeletons, and what was learnt on them, are kept for all."""

    def __init__(self) -> None:
        self._wrapped: dict[str, dict[str, Any]] = {}  # adapters.attach_skeleton's, by skeleton
        self._skeletons: dict[str, Any] = {}
        self._resolved: dict[str, Resolved] = {}
        self._plans: dict[str, Plan] = {}
        self._steps = Steps()

    def skeleton(self, model: ModelConfig, classes: int = 0) -> Any:
        """Return the base on the meta device, built once.

        Args:
            classes: of a classification; 0: a language model.
        """
        key = _skeleton_key(model, classes)
        if key not in self._skeletons:
            self._skeletons[key] = base_model.skeleton(model, classes)
        return self._skeletons[key]

    def wrapped(self, model: ModelConfig, classes: int = 0) -> dict[str, Any]:
        """Return the adapters on a skeleton so far, for `adapters.attach_skeleton` to add to."""
        return self._wrapped.setdefault(_skeleton_key(model, classes), {})

    def resolved(self, config: Config) -> Config:
        """Return the config that a run has.

        A dtype stands for `auto`, steps for epochs and warm-up, a folder for `start_from`.
        """
        if (folder := start.resolved(config)) != config.start_from:
            config = dataclasses.replace(config, start_from=folder)
        return self._steps.resolved(base_model.settled(config))

    def make(self, config: Config) -> Plan:
        """Resolve one run; the same config gives the same plan for as long as the planner lives.

        A dtype of `auto` is resolved first: the run is the one with that dtype written out.

        Raises:
            ConfigErrors: names that match nothing, a base that cannot be had, options that would
                train nothing, modules that no stage trains.
        """
        key = json.dumps(dataclasses.asdict(config), sort_keys=True)
        if key not in self._plans:
            made = self._make(self.resolved(config))
            made.defaults = recipe.shown(config)  # of a warm-up its share, as the recipe has it
            made.warnings += base_model.dtype_notes(config.model)
            if config.trainer.epochs is not None:
                steps = self.resolved(config).trainer.num_steps
                made.warnings.append(
                    f"trainer.epochs={config.trainer.epochs:g} makes {steps} steps"
                )
            self._plans[key] = made
        return self._plans[key]

    def ranks(self, config: Config, classes: int = 0) -> dict[str, int]:
        """Return the rank of every module that a run adapts, in the order of its plan."""
        base = self.skeleton(config.model, classes)
        return self._resolve(config, base, self.wrapped(config.model, classes)).ranks

    def _resolve(self, config: Config, base: Any, known: dict[str, Any]) -> Resolved:
        """Names, counts and reasons of a run, learnt once per distinct adapter."""
        from lorabench import adapters
        from lorabench.pack import why_alone

        groups = (config.model, config.target_modules, config.head, config.lora)
        key = json.dumps([dataclasses.asdict(group) for group in groups], sort_keys=True)
        key += f" {config.task} {base.config.num_labels} {config.data.max_length}"
        if key not in self._resolved:
            too_old = versions.too_old_for_experts()
            # Jamba's class has experts in its code, even where a checkpoint has none.
            of_experts = adapters.experts(base) or hasattr(base.config, "num_experts")
            if too_old and of_experts:
                raise ConfigErrors(f"model.path: '{model_name(config.model)}': {too_old}")
            modules = adapters.resolve_modules(base, config)
            wrapped = adapters.attach_skeleton(base, config, modules, known)
            adapters.check_bias(base, config, modules)
            adapters.check_init(base, config, modules)
            adapters.check_saved(wrapped, base, config)
            found = adapters.trainable(wrapped)
            trained = list(dict.fromkeys(map(adapters.owner, found)))
            count = sum(p.numel() for p in found.values())
            alone = why_alone(base, config, modules, wrapped)
            layers = adapters.lora_layers(wrapped)
            scales = {name: float(layers[name].scaling[adapters.ADAPTER]) for name in modules}
            ranks = {name: int(layers[name].r[adapters.ADAPTER]) for name in modules}
            notes = adapters.notes(base, modules)
            notes += adapters.embedding_notes(base, config, modules)
            self._resolved[key] = Resolved(modules, trained, count, alone, notes, scales, ranks)
        return self._resolved[key]

    def _make(self, config: Config) -> Plan:
        with imports.heavy():
            from lorabench import adapters
            from lorabench.evaluate import DEFINITIONS
            from lorabench.pack.probe import why_padded

        contents = base_model.identity(config.model) | data.content_hashes(config.data)
        contents |= _chat_contents(config)
        labels: list[str] = []
        if config.task == "seq_cls":
            labels = data.labels_of(config.data, contents["train"])
        base = self.skeleton(config.model, len(labels))
        resolved = self._resolve(config, base, self.wrapped(config.model, len(labels)))
        wrong = stages.errors(config.stages, resolved.trained) + remarks.position_errors(
            config, base
        )
        if wrong:
            raise ConfigErrors(wrong)
        head = _head_plan(config, base)
        started: list[str] = []
        if config.start_from is not None:
            begins = start.find(config.start_from)
            contents["start"] = begins.hash
            known = self.wrapped(config.model, len(labels))
            wrapped = adapters.attach_skeleton(base, config, resolved.modules, known)
            if wrong := start.differences(begins, config, base, wrapped, contents, labels):
                raise ConfigErrors(wrong)
            started = start.notes(begins, wrapped)
        total = base_model.num_parameters(base)
        weight_bytes = 8 if config.trainer.dtype == "float64" else 4
        narrow = remarks.narrow(base, resolved.ranks)
        warnings = [*recipe.warnings(config), *remarks.warnings(config, base)]
        warnings += [*narrow, *resolved.left_out, *started]
        warnings += base_model.unpinned(config.model, contents)
        saved = [head.module] if head.policy == "full" and head.module else []
        training = identity.training(
            config, contents, resolved.ranks, resolved.scales, resolved.trained, labels,
            DEFINITIONS,
        )  # fmt: skip
        evaluation = identity.evaluation(config, contents, DEFINITIONS)
        run_id = identity.short_hash(training)
        state_bytes = weight_bytes * resolved.num_trainable
        return Plan(
            run_id=run_id,
            evaluation_id=identity.short_hash(evaluation),
            evaluation=evaluation,
            contents=contents,
            folder=str(Path(config.output_dir) / config.sweep / run_id),
            model=model_name(config.model),
            lora_modules=list(resolved.modules),
            saved_modules=saved,
            trainable_parameters=resolved.num_trainable,
            total_parameters=total,
            scale=scale(config.lora),
            scales={n: x for n, x in resolved.scales.items() if x != scale(config.lora)},
            head=head,
            disk_bytes=state_bytes + 300_000,
            # Weights, two moments and the best weights: the last one, the one before, and the one
            # being written.
            checkpoint_bytes=(12 if config.trainer.keep == "best" else 9) * state_bytes,
            tracker=tracker_address(config),
            warnings=warnings,
            labels=labels,
            alone=resolved.alone,
            padded=why_padded(base),
            exports=formats.predict(
                base.config, resolved.modules, saved, config.lora, head.module, head.tied
            ),
        )


def _chat_contents(config: Config) -> dict[str, str]:
    """Return what decides the tokens of chat data, beside tokenizer and rows."""
    found = {}
    if template := data.given_hash(config.data):
        found["chat_template"] = template
    if config.data.format in data.CONVERSATIONS:
        found["stops"] = json.dumps(base_model.stops(config.model))
    return found


def _skeleton_key(model: ModelConfig, classes: int) -> str:
    return json.dumps([dataclasses.asdict(model), classes], sort_keys=True)


def make(config: Config) -> Plan:
    """Resolve one run by itself: see `Planner.make`."""
    return Planner().make(config)


def skeleton(model: ModelConfig, classes: int = 0) -> Any:
    """Build the base on the meta device: see `Planner.skeleton`."""
    return base_model.skeleton(model, classes)


def run_id(config: Config) -> str:
    """First 12 hex digits of the hash of what decides the training."""
    return make(config).run_id


def folder(config: Config) -> Path:
    """Return where the run's files lie."""
    return Path(make(config).folder)


def _head_plan(config: Config, base: Any) -> HeadPlan:
    found = base_model.output_head(base)
    tied = base_model.is_tied(base)
    name = found[0] if found else None
    if config.head.policy != "exclude" and name is None:
        raise ConfigErrors(
            f"head: must be exclude where the base has no output head; "
            f"'{model_name(config.model)}' has none; got {config.head.policy}"
        )
    consequence = {
        "exclude": "frozen; the adapter merges like any other",
        "lora": (
            "an adapter on a tied head: training and reloading are exact; `lorabench export` "
            "unties it to merge (plain merge_and_unload also changes the embeddings)"
            if tied
            else "an adapter on an untied head: merges like any other module"
        ),
        "full": (
            "a trained copy of the head, untied from the embeddings and saved with the adapter"
            if tied
            else "a trained copy of the head, saved with the adapter"
        ),
    }[config.head.policy]
    if config.task == "seq_cls":
        consequence = "trained from a draw of seeds.init, saved with the adapter"
    return HeadPlan(policy=config.head.policy, module=name, tied=tied, consequence=consequence)


def tracker_address(config: Config) -> str:
    """Where the tracker writes."""
    import os

    tracker = config.tracker
    if tracker.kind == "none" or tracker.mode == "disabled":
        return "none"
    sweep = Path(config.output_dir) / config.sweep
    if tracker.kind == "trackio":
        place = os.environ.get("TRACKIO_DIR", sweep / "trackio")
        return f"trackio database in {place}, project {tracker.project}"
    if tracker.kind == "tensorboard":
        return f"tensorboard event files in {sweep / 'tensorboard'}"
    if tracker.mode == "offline":
        return f"wandb offline files in {sweep / 'wandb'}"
    url = os.environ.get("WANDB_BASE_URL", "the wandb client's default server")
    return (
        f"wandb at {url}, project {tracker.entity + '/' if tracker.entity else ''}{tracker.project}"
    )
