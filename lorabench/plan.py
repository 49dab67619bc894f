"""config -> Plan: what a run will do, resolved and checked before anything trains.

The run id and the checks of names and files need no torch; modules and counts are read off a
skeleton of the base on the meta device, so no weights are loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from lorabench import data, formats, machine, stages, versions
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, ModelConfig, lora_alpha, model_name, scale

RUNTIME_BYTES = 450_000_000  # Python, torch and transformers themselves
# Keys of a config that never change a result.
NOT_DECIDING = {
    "trainer": {"device", "num_threads", "checkpoint_every", "log_every"},
    "model": {"path", "name", "revision"},
    "data": {"name", "train", "validation", "test"},
}


class HeadPlan(BaseModel):
    """The output layer and what the head policy does to it."""

    policy: str
    module: str | None
    tied: bool
    consequence: str


class Plan(BaseModel):
    """What one run will do."""

    run_id: str
    folder: str
    model: str
    lora_modules: list[str]
    saved_modules: list[str]
    trainable_parameters: int
    total_parameters: int
    scale: float  # what multiplies an update: lora_alpha / r, or lora_alpha / sqrt(r)
    scales: dict[str, float]  # of modules where a pattern gives another
    head: HeadPlan
    base_bytes: int  # the part of memory_bytes that all runs of a pack share
    logits_bytes: int = 0  # the part of it for logits, of which a pack has no more than a chunk
    memory_bytes: int  # estimate: base, adapter, optimizer, activations of one micro-batch
    disk_bytes: int  # estimate: what the run folder will hold
    train_flops: float  # estimate: 4 x parameters FLOPs a token, for all steps
    tracker: str
    warnings: list[str]
    labels: list[str] = []  # of a classification: its classes, in the order of their numbers
    alone: str | None  # why the run cannot share a base forward; None: it packs
    exports: dict[str, str]  # adapter, merged, gguf: yes, or why not
    pack: dict[str, Any] = {}  # once it is formed: id, size, members


def deciding(config: Config) -> dict[str, Any]:
    """What decides a run's result, canonically: the content the run id is the hash of."""
    content = dataclasses.asdict(config)
    for group, keys in NOT_DECIDING.items():
        content[group] = {k: v for k, v in content[group].items() if k not in keys}
    lora = content["lora"]
    lora["lora_alpha"] = lora_alpha(config.lora)
    del lora["alpha_ratio"]
    content["model"] |= base_model.identity(config.model)
    content["stages"] = stages.canonical(config.stages)
    content["data"]["content"] = data.content_hash(config.data)
    for key in ("tracker", "output_dir", "sweep", "seed"):
        del content[key]
    return content


def run_id(config: Config) -> str:
    """First 12 hex digits of sha256 over the canonical JSON of what decides the result."""
    text = json.dumps(deciding(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def folder(config: Config) -> Path:
    """Where the run's files lie."""
    return Path(config.output_dir) / config.sweep / run_id(config)


def check(config: Config) -> list[str]:
    """Errors found without loading anything: versions, device, where base, data and output are."""
    errors = versions.check(config) + machine.check_device(config.trainer.device)
    errors += base_model.check(config.model) + data.check(config.data)
    place = Path(config.output_dir)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        errors.append(f"output_dir: must be a folder; '{place}' is a file; set output_dir=...")
    elif not _writable(place):
        errors.append(
            f"output_dir: must be writable; '{place}' is not; set output_dir=... or change its mode"
        )
    return errors


def _writable(place: Path) -> bool:
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=place):
            return True
    except OSError:
        return False


@lru_cache(maxsize=8)
def _skeleton(key: str, classes: int) -> Any:
    return base_model.skeleton(ModelConfig(**json.loads(key)), classes)


def skeleton(model: ModelConfig, classes: int = 0) -> Any:
    """The base on the meta device, built once for all runs of a process.

    Args:
        classes: of a classification; 0: a language model.
    """
    return _skeleton(json.dumps(dataclasses.asdict(model), sort_keys=True), classes)


class Resolved(NamedTuple):
    """What PEFT makes of a run's settings, learnt on a skeleton."""

    modules: list[str]  # that get an adapter
    trained: list[str]  # these, and modules that train a copy or a bias
    num_trainable: int  # parameters
    alone: str | None  # why the run cannot share a base forward
    left_out: list[str]  # what all-linear and the like do not adapt
    scales: dict[str, float]  # what multiplies each module's update, patterns included
    ranks: dict[str, int]


_RESOLVED: dict[str, Resolved] = {}


def _resolve(config: Config, base: Any) -> Resolved:
    """Names, counts and reasons of a run.

    Learnt on a skeleton, once per distinct adapter.
    """
    from lorabench import adapters
    from lorabench.pack import why_alone

    groups = (config.model, config.target_modules, config.head, config.lora)
    key = json.dumps([dataclasses.asdict(group) for group in groups], sort_keys=True)
    key += f" {config.task} {base.config.num_labels}"
    if key not in _RESOLVED:
        too_old = versions.too_old_for_experts()
        if too_old and adapters.experts(base):
            raise ConfigErrors(f"model.path: '{model_name(config.model)}': {too_old}")
        modules = adapters.resolve_modules(base, config)
        wrapped = adapters.attach_skeleton(base, config, modules)
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
        _RESOLVED[key] = Resolved(modules, trained, count, alone, notes, scales, ranks)
    return _RESOLVED[key]


def make(config: Config) -> Plan:
    """Resolve one run.

    Raises:
        ConfigErrors: names that match nothing, a base that cannot be had, options that would
            train nothing, modules that no stage trains.
    """
    from lorabench.pack.head import CHUNK_BYTES

    labels: list[str] = []
    if config.task == "seq_cls":
        labels = data.labels_of(config.data, data.content_hash(config.data))
    base = skeleton(config.model, len(labels))
    resolved = _resolve(config, base)
    wrong = stages.errors(config.stages, resolved.trained)
    if wrong:
        raise ConfigErrors(wrong)
    head = _head_plan(config, base)
    total = base_model.num_parameters(base)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions and config.data.max_length > positions:
        raise ConfigErrors(
            f"data.max_length: must be at most the {positions} positions of base model "
            f"'{model_name(config.model)}'; got {config.data.max_length}; set "
            f"data.max_length={positions} or less"
        )
    weight_bytes = 8 if config.trainer.dtype == "float64" else 4
    text = base.config.get_text_config()
    tokens = (config.trainer.micro_batch_size or config.trainer.batch_size) * config.data.max_length
    activation = 2 if config.trainer.dtype == "bfloat16" else weight_bytes
    layers = 1 if config.trainer.gradient_checkpointing else text.num_hidden_layers
    activations = tokens * text.hidden_size * layers * 34 * activation
    base_bytes = RUNTIME_BYTES + sum(p.numel() * p.element_size() for p in base.parameters())
    # Logits, their softmax and its gradient; more than a chunk never exists, of all runs together.
    logits = 3 * min(tokens * (len(labels) or text.vocab_size) * 4, CHUNK_BYTES)
    narrow = _narrow(base, resolved.ranks)
    warnings = [*_warnings(config, base), *narrow, *resolved.left_out]
    saved = [head.module] if head.policy == "full" and head.module else []
    return Plan(
        run_id=run_id(config),
        folder=str(folder(config)),
        model=model_name(config.model),
        lora_modules=list(resolved.modules),
        saved_modules=saved,
        trainable_parameters=resolved.num_trainable,
        total_parameters=total,
        scale=scale(config.lora),
        scales={n: x for n, x in resolved.scales.items() if x != scale(config.lora)},
        head=head,
        base_bytes=base_bytes,
        logits_bytes=logits,
        memory_bytes=base_bytes + 4 * weight_bytes * resolved.num_trainable + activations + logits,
        disk_bytes=weight_bytes
        * resolved.num_trainable
        * (4 if config.trainer.checkpoint_every else 1)
        + 300_000,
        train_flops=4.0
        * total
        * config.trainer.steps
        * config.trainer.batch_size
        * config.data.max_length,
        tracker=tracker_address(config),
        warnings=warnings,
        labels=labels,
        alone=resolved.alone,
        exports=formats.predict(
            base.config, resolved.modules, saved, config.lora, head.module, head.tied
        ),
    )


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


def _warnings(config: Config, base: Any) -> list[str]:
    from transformers import AutoConfig

    found = []
    if config.trainer.warmup_steps >= config.trainer.steps:
        found.append("trainer.warmup_steps: the whole run is warm-up, lr never reaches its peak")
    was = [name for name in base.config.architectures or () if "SequenceClassification" in name]
    if config.task == "seq_cls" and was:
        found.append(f"the checkpoint is a classifier itself ({was[0]}): its head is replaced")
    where = base_model.location(config.model)
    if Path(where).is_dir():
        original = AutoConfig.from_pretrained(where)
        for key, value in base_model.random_settings(original).items():
            found.append(f"the base's own {key}={value:g} is switched off: only lora_dropout acts")
    return found


def _narrow(base: Any, ranks: dict[str, int]) -> list[str]:
    """Says where r is more than a module has rows or columns: PEFT takes it without a word."""
    sides = {name: min(base.get_submodule(name).weight.shape) for name in ranks}
    below: dict[int, list[str]] = {}
    for name, r in ranks.items():
        if r > sides[name]:
            below.setdefault(r, []).append(name)
    return [
        f"lora.r: {r} is more than the smaller side of {len(names)} module"
        f"{'s' if len(names) > 1 else ''} (such as {names[0]}: {sides[names[0]]}): there it adds "
        f"nothing but parameters"
        for r, names in below.items()
    ]


def tracker_address(config: Config) -> str:
    """Where the tracker writes."""
    import os

    tracker = config.tracker
    if tracker.kind == "none" or tracker.mode == "disabled":
        return "none"
    if tracker.mode == "offline":
        return f"wandb offline files in {Path(config.output_dir) / config.sweep / 'wandb'}"
    url = os.environ.get("WANDB_BASE_URL", "the wandb client's default server")
    return (
        f"wandb at {url}, project {tracker.entity + '/' if tracker.entity else ''}{tracker.project}"
    )
