"""The groups of an experiment as dataclasses: what a user may write, with units and ranges.

Knows neither torch nor PEFT nor Hydra's runtime: names are checked against a model in `plan`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

TASKS = ("causal_lm",)
DTYPES = ("float64", "float32", "bfloat16")
METRICS = ("nll", "exact_match", "answer")


class ConfigErrors(ValueError):
    """Everything wrong with one config or a whole sweep, collected before anything is loaded."""

    def __init__(self, errors: Iterable[str] | str):
        self.errors = list(dict.fromkeys([errors] if isinstance(errors, str) else errors))
        super().__init__("\n".join(self.errors))


# OmegaConf reads these annotations at run time and needs typing's spelling of Optional.
@dataclass
class ModelConfig:
    """The base model: a hub id, a local folder, or `lorabench:NAME` for an embedded one."""

    path: str = MISSING
    name: str | None = None  # label in tables; None: the last part of path
    revision: str | None = None  # commit on the hub; ignored for a folder
    dtype: str = "float32"  # of the frozen base weights
    attn_implementation: str = "sdpa"  # sdpa | eager | flash_attention_2


@dataclass
class TargetModulesConfig:
    """Which modules get an adapter (the head is the head policy's business)."""

    select: str = "all-linear"  # auto | attention | mlp | all-linear | custom
    names: Any = None  # with select=custom: a list of name endings, or one full-match regex
    exclude: list[str] = field(default_factory=list)  # name endings taken out again


@dataclass
class HeadConfig:
    """What happens to the output layer: nothing, an adapter on it, or a trained copy of it."""

    policy: str = "exclude"  # exclude | lora | full


@dataclass
class LoraSettings:
    """PEFT's LoRA settings in PEFT's spelling. The effective scale is lora_alpha / r."""

    r: int = 16  # >= 1
    lora_alpha: float | None = None  # > 0; give this or alpha_ratio, not both
    alpha_ratio: float | None = None  # lora_alpha / r; with neither given: 2
    lora_dropout: float = 0.0  # probability, in [0, 1)
    bias: str = "none"  # none | lora_only | all
    use_rslora: bool = False  # scale lora_alpha / sqrt(r)
    use_dora: bool = False
    init: str = "default"  # default (PEFT's Kaiming-uniform A, zero B) | gaussian | olora | pissa
    rank_pattern: Any = None  # {module name or regex: r} where r differs
    alpha_pattern: Any = None  # {module name or regex: lora_alpha} where it differs


@dataclass
class SourceConfig:
    """Where the examples of one split come from."""

    path: str | None = None  # jsonl: a file; hub: a dataset id or local folder
    subset: str | None = None  # hub: configuration name
    split: str = "train"  # hub: split name
    revision: str | None = None  # hub: commit
    prompt: str | None = None  # template over columns; None: data.prompt
    completion: str | None = None  # template over columns; None: data.completion


@dataclass
class DataConfig:
    """Prompt/completion examples, how they become tokens, and how they are scored."""

    name: str = MISSING  # label in tables
    source: str = MISSING  # skills | jsonl | hub
    # skills (embedded)
    skills: list[str] = field(default_factory=list)
    min_word_length: int = 3  # letters
    max_word_length: int = 8  # letters
    # jsonl, hub
    train: SourceConfig = field(default_factory=SourceConfig)
    validation: SourceConfig = field(default_factory=SourceConfig)
    test: SourceConfig = field(default_factory=SourceConfig)
    prompt: str = "{prompt}"  # template over columns
    completion: str = "{completion}"  # template over columns
    split_by: str | None = None  # column whose hash splits; None: the prompt
    validation_fraction: float = 0.05  # taken from train where validation has no path
    test_fraction: float = 0.05  # taken from train where test has no path
    # sizes, in examples; None: all there are
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None
    # tokens
    chat_template: bool = False  # prompt as a user turn, completion as the assistant's
    add_bos: bool = True  # where the tokenizer has one
    add_eos: bool = True  # the completion ends with it
    max_length: int = 512  # tokens of prompt and completion; longer examples are left out, counted
    # scores
    metric: list[str] = field(default_factory=lambda: ["nll", "exact_match"])
    answer_pattern: str | None = None  # regex; its last match's last group is the answer
    answer_examples: int = 200  # examples to generate on
    answer_max_new_tokens: int = 256


@dataclass
class TrainerConfig:
    """One optimizer run. One step is one batch, in one or more micro-batches."""

    steps: int = 200
    batch_size: int = 8  # examples a step
    micro_batch_size: int | None = None  # examples a forward; divides batch_size; None: all
    lr: float = 1e-3  # peak learning rate
    schedule: str = "linear"  # constant | linear | cosine, after the warm-up, to zero
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0  # None: no clipping
    dtype: str = "${model.dtype}"  # of the computation; bfloat16: autocast, adapters in float32
    gradient_checkpointing: bool = False
    device: str = "auto"  # auto | cuda | cuda:N | mps | cpu
    deterministic: bool = True  # torch.use_deterministic_algorithms
    allow_tf32: bool = False
    num_threads: int | None = None  # CPU threads; None: torch's choice
    eval_every: int = 0  # steps between validation losses; 0: only after training
    eval_batch_size: int = 32  # examples
    eval_examples: int | None = None  # of each split; None: all
    log_every: int = 1  # steps between lines of metrics.jsonl
    checkpoint_every: int = 0  # steps between checkpoints; 0: none


@dataclass
class TrackerConfig:
    """A mirror of the run folder; it may fail without hurting a run."""

    kind: str = "wandb"  # wandb | none
    mode: str = "offline"  # offline | online | disabled
    project: str = "lorabench"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)  # besides the model's and the head's


@dataclass
class SeedsConfig:
    """Three independent streams, so that one can vary while the others stay."""

    init: int = 0  # initial A of every module
    data: int = 0  # order of the training examples
    dropout: int = 0  # masks of lora_dropout


@dataclass
class Config:
    """One run."""

    task: str = "causal_lm"
    model: ModelConfig = field(default_factory=ModelConfig)
    target_modules: TargetModulesConfig = field(default_factory=TargetModulesConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    stages: list[Any] = field(default_factory=list)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    seed: int = 0
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    sweep: str = "default"  # folder of the sweep below output_dir
    output_dir: str = "outputs"


def register() -> None:
    """Put the typed schema where `conf/train.yaml` finds it, and the run-id resolver beside it."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def typed(cfg: DictConfig) -> Config:
    """The composed config as dataclasses, interpolations resolved.

    Raises:
        ConfigErrors: a required key is missing, or a value is out of its range.
    """
    known = [spec.name for spec in fields(Config)]
    unknown = [
        f"{key}: no such key; got {did_you_mean(key, known)}"
        for key in map(str, cfg)
        if key not in (*known, "hydra")
    ]
    if unknown:
        raise ConfigErrors(unknown)
    cfg = OmegaConf.masked_copy(cfg, known)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigErrors(f"{key}: must be given; got nothing; set {key}=..." for key in missing)
    config = _build(Config, OmegaConf.to_container(cfg, resolve=True))
    errors = range_errors(config)
    if errors:
        raise ConfigErrors(errors)
    return config


def _build(cls: type, values: Any, prefix: str = "") -> Any:
    """Nested dataclasses from plain containers (types were checked when Hydra composed them)."""
    if not is_dataclass(cls):
        return values
    hints = get_type_hints(cls)
    # `+lora.foo=1` gets past Hydra
    errors = [
        f"{prefix}{key}: no such key; got {did_you_mean(str(key), hints)}"
        for key in values
        if key not in hints
    ]
    built = {}
    for key in (key for key in values if key in hints):
        try:
            built[key] = _build(hints[key], values[key], f"{prefix}{key}.")
        except ConfigErrors as inner:
            errors += inner.errors
    if errors:
        raise ConfigErrors(errors)
    return cls(**built)


def lora_alpha(lora: LoraSettings) -> float:
    """The alpha a run uses: as given, or alpha_ratio * r, or 2 r."""
    if lora.lora_alpha is not None:
        return lora.lora_alpha
    return (2.0 if lora.alpha_ratio is None else lora.alpha_ratio) * lora.r


def scale(lora: LoraSettings) -> float:
    """What multiplies B A x: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""
    return lora_alpha(lora) / (math.sqrt(lora.r) if lora.use_rslora else lora.r)


def model_name(model: ModelConfig) -> str:
    """Label of the base model in tables and tags."""
    return model.name or re.split(r"[/\\:]", model.path.rstrip("/\\"))[-1]


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names that `name` was probably meant to be, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`'x' (did you mean 'y'?)`, or `'x'` alone."""
    close = nearest(name, known)
    return f"'{name}' (did you mean '{close[0]}'?)" if close else f"'{name}'"


def keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key a config can hold."""
    found = []
    hints = get_type_hints(cls)
    for spec in fields(cls):
        found.append(prefix + spec.name)
        if is_dataclass(hints[spec.name]):
            found += keys(hints[spec.name], f"{prefix}{spec.name}.")
    return found


def range_errors(config: Config) -> list[str]:
    """Every value out of its range, one line each: the law, what came, the remedy."""
    errors: list[str] = []

    def must(holds: bool, key: str, law: str, got: Any, remedy: str = "") -> None:
        if not holds:
            errors.append(f"{key}: must be {law}; got {got!r}" + (f"; {remedy}" if remedy else ""))

    def one_of(key: str, got: str, allowed: Iterable[str]) -> None:
        if got not in allowed:
            errors.append(
                f"{key}: must be one of {', '.join(allowed)}; got {did_you_mean(str(got), allowed)}"
            )

    lora, data, trainer, tracker = config.lora, config.data, config.trainer, config.tracker
    one_of("task", config.task, TASKS)
    one_of("model.dtype", config.model.dtype, DTYPES)
    one_of(
        "model.attn_implementation",
        config.model.attn_implementation,
        ("sdpa", "eager", "flash_attention_2"),
    )
    one_of("head.policy", config.head.policy, ("exclude", "lora", "full"))

    targets = config.target_modules
    one_of(
        "target_modules.select",
        targets.select,
        ("auto", "attention", "mlp", "all-linear", "custom"),
    )
    if targets.select == "custom":
        valid = isinstance(targets.names, str) or (
            isinstance(targets.names, list) and all(isinstance(n, str) for n in targets.names)
        )
        must(
            bool(targets.names) and valid,
            "target_modules.names",
            "a list of module names or one regex",
            targets.names,
            "for example target_modules.names=[q_proj,v_proj]",
        )
    else:
        must(
            targets.names is None,
            "target_modules.names",
            f"left out with target_modules={targets.select}",
            targets.names,
            "use target_modules=custom",
        )

    must(lora.r >= 1, "lora.r", "at least 1", lora.r)
    if lora.lora_alpha is not None and lora.alpha_ratio is not None:
        errors.append(
            "lora: lora_alpha and alpha_ratio both set the scale, give one of them; "
            f"got lora_alpha={lora.lora_alpha:g} and alpha_ratio={lora.alpha_ratio:g}"
        )
    for key in ("lora_alpha", "alpha_ratio"):
        value = getattr(lora, key)
        must(value is None or (math.isfinite(value) and value > 0), f"lora.{key}", "above 0", value)
    must(0 <= lora.lora_dropout < 1, "lora.lora_dropout", "in [0, 1)", lora.lora_dropout)
    one_of("lora.bias", lora.bias, ("none", "lora_only", "all"))
    one_of("lora.init", lora.init, ("default", "gaussian", "olora", "pissa"))
    must(
        not (lora.use_dora and lora.init in ("olora", "pissa")),
        "lora.use_dora",
        f"false with lora.init={lora.init}",
        True,
    )
    for key, least in (
        ("rank_pattern", "a whole number of at least 1"),
        ("alpha_pattern", "above 0"),
    ):
        pattern = getattr(lora, key)
        if pattern is not None and not isinstance(pattern, dict):
            must(False, f"lora.{key}", "a mapping such as {q_proj: 8}", pattern)
            continue
        for name, value in (pattern or {}).items():
            number = isinstance(value, int if key == "rank_pattern" else (int, float))
            must(number and value > 0, f"lora.{key}.{name}", least, value)

    one_of("data.source", data.source, ("skills", "jsonl", "hub"))
    if data.source == "skills":
        must(bool(data.skills), "data.skills", "at least one skill", data.skills)
        must(
            1 <= data.min_word_length <= data.max_word_length,
            "data.min_word_length",
            f"in [1, max_word_length={data.max_word_length}]",
            data.min_word_length,
        )
    else:
        must(
            data.train.path is not None,
            "data.train.path",
            "a file" if data.source == "jsonl" else "a dataset id or folder",
            None,
            "set data.train.path=...",
        )
    must(bool(data.metric), "data.metric", f"a list out of {', '.join(METRICS)}", data.metric)
    for metric in data.metric:
        one_of("data.metric", metric, METRICS)
    must(
        "answer" not in data.metric or data.answer_pattern is not None,
        "data.answer_pattern",
        "a regular expression where data.metric asks for answer",
        data.answer_pattern,
    )
    if data.answer_pattern is not None:
        try:
            re.compile(data.answer_pattern)
        except re.error as error:
            errors.append(f"data.answer_pattern: must be a regular expression; {error}")
    must(data.max_length >= 2, "data.max_length", "at least 2 tokens", data.max_length)
    for key in ("num_train", "num_validation", "num_test"):
        value = getattr(data, key)
        must(value is None or value >= 1, f"data.{key}", "at least 1", value)
    for key in ("answer_examples", "answer_max_new_tokens"):
        must(getattr(data, key) >= 1, f"data.{key}", "at least 1", getattr(data, key))
    for key in ("validation_fraction", "test_fraction"):
        must(0 < getattr(data, key) < 1, f"data.{key}", "in (0, 1)", getattr(data, key))
    must(
        data.validation_fraction + data.test_fraction < 1,
        "data.test_fraction",
        "such that some examples are left to train on",
        data.test_fraction,
    )

    micro = trainer.micro_batch_size
    must(
        micro is None or (micro >= 1 and trainer.batch_size % micro == 0),
        "trainer.micro_batch_size",
        f"a divisor of trainer.batch_size={trainer.batch_size}",
        micro,
    )
    for key in ("steps", "batch_size", "eval_batch_size", "log_every"):
        must(getattr(trainer, key) >= 1, f"trainer.{key}", "at least 1", getattr(trainer, key))
    for key in ("warmup_steps", "eval_every", "checkpoint_every"):
        must(getattr(trainer, key) >= 0, f"trainer.{key}", "at least 0", getattr(trainer, key))
    must(math.isfinite(trainer.lr) and trainer.lr > 0, "trainer.lr", "above 0", trainer.lr)
    must(trainer.weight_decay >= 0, "trainer.weight_decay", "at least 0", trainer.weight_decay)
    must(trainer.eps > 0, "trainer.eps", "above 0", trainer.eps)
    for key in ("beta1", "beta2"):
        must(0 <= getattr(trainer, key) < 1, f"trainer.{key}", "in [0, 1)", getattr(trainer, key))
    must(
        trainer.max_grad_norm is None or trainer.max_grad_norm > 0,
        "trainer.max_grad_norm",
        "above 0 or null",
        trainer.max_grad_norm,
    )
    must(
        trainer.num_threads is None or trainer.num_threads >= 1,
        "trainer.num_threads",
        "at least 1 or null",
        trainer.num_threads,
    )
    one_of("trainer.schedule", trainer.schedule, ("constant", "linear", "cosine"))
    one_of("trainer.dtype", trainer.dtype, DTYPES)
    must(
        trainer.dtype == config.model.dtype
        or (trainer.dtype, config.model.dtype) == ("bfloat16", "float32"),
        "trainer.dtype",
        f"model.dtype={config.model.dtype}, or bfloat16 (autocast) over float32",
        trainer.dtype,
    )
    must(
        re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", trainer.device) is not None,
        "trainer.device",
        "auto, cpu, mps, cuda or cuda:N",
        trainer.device,
    )

    one_of("tracker.kind", tracker.kind, ("wandb", "none"))
    one_of("tracker.mode", tracker.mode, ("offline", "online", "disabled"))
    for key in ("init", "data", "dropout"):
        must(
            getattr(config.seeds, key) >= 0,
            f"seeds.{key}",
            "at least 0",
            getattr(config.seeds, key),
        )
    must(
        not config.stages,
        "stages",
        "empty: this version trains every module from step 0",
        config.stages,
        "use stages=none",
    )
    must(
        re.fullmatch(r"[\w.\-]+", config.sweep) is not None and config.sweep not in (".", ".."),
        "sweep",
        "one folder name of letters, digits, '.', '_' and '-'",
        config.sweep,
    )
    return errors
