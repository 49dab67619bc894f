"""The groups of an experiment as dataclasses: what a user may write, with units.

Knows neither torch nor PEFT nor Hydra's runtime: names are checked against a model in `plan`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import MISSING


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
    labels: list[str] | None = None  # task=seq_cls: the classes; None: train's completions, sorted
    split_by: str | None = None  # column whose hash splits; None: the prompt
    validation_fraction: float = 0.05  # about this part of train, where validation has no path
    test_fraction: float = 0.05  # about this part of train, where test has no path
    # sizes, in examples; None: all there are
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None
    # tokens
    chat_template: bool = False  # prompt as a user turn, completion as the assistant's
    add_bos: bool = True  # where the tokenizer itself opens a text with BOS
    add_eos: bool = True  # the completion ends with it
    max_length: int = 512  # tokens of prompt and completion; longer examples are left out, counted
    # scores
    metric: list[str] = field(default_factory=lambda: ["nll", "exact_match"])
    answer_pattern: str | None = None  # regex; the last group of its first match is the answer
    answer_stop: list[str] = field(default_factory=list)  # a generation ends before any of these
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
class WorkerConfig:
    """How processes share the packs of a sweep."""

    stale_seconds: float = 120.0  # a process that does not answer for so long is replaced


@dataclass
class SeedsConfig:
    """Three independent streams, so that one can vary while the others stay."""

    init: int = 0  # initial A of every module
    data: int = 0  # order of the training examples
    dropout: int = 0  # masks of lora_dropout


@dataclass
class Config:
    """One run."""

    task: str = "causal_lm"  # causal_lm | seq_cls: the completion is a label of the prompt
    model: ModelConfig = field(default_factory=ModelConfig)
    target_modules: TargetModulesConfig = field(default_factory=TargetModulesConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    # {from_step, train: [parts of module names, or all], lr_scale: 1.0}; empty: all from step 0
    stages: list[Any] = field(default_factory=list)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    objective: str = "validation/nll"  # split/metric: what a job returns to a sweeper of Hydra
    seed: int = 0
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    sweep: str = "default"  # folder of the sweep below output_dir
    output_dir: str = "outputs"


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


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as dotted keys; lists stay values."""
    if not isinstance(content, dict):
        return {prefix[:-1]: content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flatten(value, f"{prefix}{key}.")
    return found


def keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key a config can hold."""
    found = []
    hints = get_type_hints(cls)
    for spec in fields(cls):
        found.append(prefix + spec.name)
        if is_dataclass(hints[spec.name]):
            found += keys(hints[spec.name], f"{prefix}{spec.name}.")
    return found
