"""The groups of an experiment as dataclasses: every key a user can set, with its unit.

Knows neither torch nor PEFT nor Hydra's runtime: names are checked against a model in `plan`.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import MISSING


# OmegaConf reads these annotations at run time and needs typing's spelling of Optional. The comment
# behind a field is its description in docs/config-reference.md; a comment on a line of its own is a
# heading there. The values of a choice are in choices.CHOICES.
@dataclass
class ModelConfig:
    """The frozen base model: a Hub id, a local folder, or `lorabench:NAME` for an embedded one."""

    path: str = MISSING  # Hub id, local folder or lorabench:NAME
    name: str | None = None  # label in tables; None: the last part of path
    revision: str | None = None  # commit on the Hub; ignored for a folder
    dtype: str = (
        "float32"  # dtype of the frozen weights; auto: the checkpoint's, bfloat16 for float16
    )
    attn_implementation: str = "sdpa"  # attention kernel, as in transformers
    allow_kernel_code: bool = False  # download and run the kernel of the Hub named there


@dataclass
class TargetModulesConfig:
    """The modules that get an adapter. The output head is not among them: see `head`."""

    select: str = "all-linear"  # which modules; auto: PEFT's default for the architecture
    names: Any = None  # with select=custom: a list of name endings, or one regex over full names
    exclude: list[str] = field(default_factory=list)  # name endings to leave out of the selection


@dataclass
class HeadConfig:
    """How the output head is trained."""

    policy: str = "exclude"  # exclude: frozen; lora: an adapter on it; full: a trained copy of it


@dataclass
class LoraSettings:
    """PEFT's LoRA settings, spelled as in PEFT. The effective scale is lora_alpha / r."""

    r: int = 16  # rank, at least 1
    lora_alpha: float | None = None  # above 0; set this or alpha_ratio, not both
    alpha_ratio: float | None = None  # lora_alpha / r; 2 if neither of the two is set
    lora_dropout: float = 0.0  # dropout probability of the adapters' inputs, in [0, 1)
    bias: str = "none"  # which biases train: none, those of adapted modules, or all
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead
    use_dora: bool = False  # weight-decomposed LoRA (DoRA)
    init: str = "default"  # initial A and B; default: Kaiming-uniform A and zero B, as in PEFT
    loraplus_lr_ratio: float | None = None  # LoRA+: B's lr / A's, which is trainer.lr; None: 1
    rank_pattern: Any = None  # {module name or regex: r} for modules whose rank differs
    alpha_pattern: Any = None  # {module name or regex: lora_alpha} for modules whose alpha differs


@dataclass
class SourceConfig:
    """Where the examples of one split come from."""

    path: str | None = None  # jsonl: a file; hub: an id or a folder; path: file, folder, glob or id
    subset: str | None = None  # hub: name of the dataset's configuration
    split: str = "train"  # hub: name of the split
    revision: str | None = None  # hub: commit
    sample_by: str = "document"  # text files: what a row is, the whole file, a paragraph or a line
    prompt: str | None = None  # template over columns; None: data.prompt
    completion: str | None = None  # template over columns; None: data.completion


@dataclass
class PartConfig(SourceConfig):
    """A source with a format of its own. What it leaves out is as in `data`."""

    format: str | None = None  # what a row is; None: data.format
    messages: str | None = None  # column of a conversation; None: data.messages
    text: str | None = None  # format=text: template over columns; None: data.text
    num: int | None = None  # examples; None: all


@dataclass
class MixtureConfig(PartConfig):
    """One source of a mixture."""

    name: str | None = None  # what its scores are recorded under; None: the last part of path
    weight: float | None = None  # share of the mixture, relative to the other weights


@dataclass
class NamedSetConfig(PartConfig):
    """A test set beside `data.test`; like it, it decides scores and no training."""


@dataclass
class DataConfig:
    """Prompt/completion examples, how they are tokenized, and how they are scored."""

    name: str = MISSING  # label in tables
    source: str = MISSING  # where examples come from; skills and gym: generated, need no network
    format: str = "prompt_completion"  # what a row is; text: continued pretraining
    # source=skills
    skills: list[str] = field(default_factory=list)  # names in lorabench/zoo/skills.py
    min_word_length: int = 3  # letters per word, at least
    max_word_length: int = 8  # letters per word, at most
    # source=gym
    gym: Any = None  # {task of reasoning-gym: its settings}, such as {chain_sum: {max_terms: 3}}
    gym_seed: int = 0  # another seed gives other questions; none moves to another split
    # source=jsonl, source=hub and source=path
    train: SourceConfig = field(default_factory=SourceConfig)
    validation: SourceConfig = field(default_factory=SourceConfig)
    test: SourceConfig = field(default_factory=SourceConfig)
    mixture: list[Any] = field(  # sources in place of train.path
        default_factory=list, metadata={"each": MixtureConfig}
    )
    tests: Any = field(  # {name: source}: more test sets
        default=None, metadata={"each": NamedSetConfig}
    )
    retention: NamedSetConfig = field(default_factory=NamedSetConfig)  # what the base could do
    # What a row gives; of source=gym the columns are question and answer
    prompt: str = "{prompt}"  # template over columns; [[ ]]: left out if a column in it is empty
    completion: str = "{completion}"  # template over columns
    messages: str | None = None  # column of a conversation; None: messages, or conversations
    text: str = "{text}"  # format=text: template over columns
    system: str = "template"  # system turns: for the template, folded into the user's, dropped
    merge_turns: bool = False  # join neighbouring turns of one role
    loss_on: str = "all"  # which assistant turns carry a loss, if they do not say train: false
    tools: str | None = "tools"  # column of the tools that a conversation may call, if there is one
    # Labels and splits
    labels: list[str] | None = None  # task=seq_cls: the classes; None: train's completions, sorted
    split_by: str | None = None  # column whose hash decides an example's split; None: the prompt
    validation_fraction: float = 0.05  # part of train to hold out if validation.path is not set
    test_fraction: float = 0.05  # part of train to hold out if test.path is not set
    # Sizes
    num_train: int | None = None  # examples; None: all
    num_validation: int | None = None  # examples; None: all
    num_test: int | None = None  # examples; None: all
    # Tokens
    chat_template: Any = False  # true: the tokenizer's; chatml, gemma, llama3, qwen; or a file
    chat_template_kwargs: Any = None  # {name: value} that the template gets, as enable_thinking
    add_bos: bool = True  # prepend BOS if the tokenizer itself does
    add_eos: bool = True  # append EOS to the completion
    max_length: int = 512  # tokens of an example
    too_long: str = "leave_out"  # longer examples; cut_prompt: cut the left of the prompt
    allow_left_out: float = 0.05  # part of a split that may be left out as too long, in [0, 1]
    group_by_length: bool = False  # batches of similar lengths, as the HF Trainer groups them
    # Scores
    metric: list[str] = field(default_factory=lambda: ["nll", "exact_match"])  # metrics to report
    answer_pattern: str | None = None  # regex; the last group of its first match is the answer
    answer_stop: list[str] = field(default_factory=list)  # texts before which a generation is cut
    answer_examples: int = 200  # examples to generate answers for
    answer_max_new_tokens: int = 256  # tokens per generation, at most


@dataclass
class TrainerConfig:
    """Optimization with AdamW. One step is one batch, in one or more micro-batches."""

    # Optimizer
    steps: int | None = 200  # optimizer steps; set this or epochs, not both
    epochs: float | None = None  # passes over train, counted as the HF Trainer counts them
    batch_size: int = 8  # examples per step
    micro_batch_size: int | None = None  # examples per forward, a divisor of batch_size; None: all
    lr: float = 1e-3  # peak learning rate
    schedule: str = "linear"  # of the learning rate after the warm-up
    warmup_steps: int = 0  # steps of linear warm-up
    warmup_ratio: float | None = None  # the same as a share of all steps, rounded up
    min_lr_ratio: float = 0.0  # share of lr at which linear and cosine end
    weight_decay: float = 0.0  # not applied to biases and norms, as in the HF Trainer
    beta1: float = 0.9  # AdamW's decay rate of the first moment
    beta2: float = 0.999  # AdamW's decay rate of the second moment
    eps: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float | None = 1.0  # clip gradients to this norm; None: no clipping
    # Computation
    dtype: str = "${model.dtype}"  # auto: model.dtype; bfloat16 over a float32 base: autocast
    gradient_checkpointing: bool = False  # recompute activations in backward to save memory
    device: str = "auto"  # auto, cuda, cuda:N, mps or cpu
    deterministic: bool = True  # torch.use_deterministic_algorithms
    allow_tf32: bool = False  # TF32 matrix products on CUDA
    compile: str = "auto"  # torch.compile a pack's model; auto: where it is reckoned to save time
    num_threads: int | None = None  # CPU threads; None: torch's default
    # Evaluation, logs, checkpoints
    eval_every: int = 0  # steps between scores on validation; 0: only after training
    keep: str = "last"  # which adapter is saved; best: of the best `objective` during training
    patience: int | None = None  # stop after as many evaluations without a better `objective`
    eval_batch_size: int = 32  # examples per forward
    eval_examples: int | None = None  # examples per split; None: all
    eval_base: bool = True  # score the untrained base too, once per sweep; classifiers have none
    log_every: int = 1  # steps between lines of metrics.jsonl
    checkpoint_every: int = 0  # steps between checkpoints; 0: none by steps
    checkpoint_minutes: float = 5.0  # minutes between checkpoints; 0: none by time

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a run that is planned: `Planner.resolved` turns epochs into steps."""
        assert self.steps is not None and self.epochs is None, (
            "epochs are turned into steps before anything counts them"
        )
        return self.steps


@dataclass
class TrackerConfig:
    """A mirror of the run folder. A tracker that fails or hangs neither fails nor changes a run."""

    kind: str = "wandb"  # none: no tracker
    mode: str = "offline"  # W&B's mode; disabled: no tracker
    project: str = "lorabench"  # W&B's or trackio's project
    entity: str | None = None  # W&B's entity; None: the default of your account
    tags: list[str] = field(default_factory=list)  # in addition to those of model and head
    log_adapter: bool = True  # W&B, online: each run's adapter becomes an artifact


@dataclass
class WorkerConfig:
    """How several processes share the packs of a sweep."""

    stale_seconds: float = 120.0  # seconds without a sign of life before a process is replaced


@dataclass
class CompareConfig:
    """What `lorabench compare` and `settle` ask of a sweep, where their options do not."""

    vary: list[str] = field(default_factory=list)  # what to ask about; none: all that varies
    select: str | None = None  # key chosen on validation instead of compared, such as trainer.lr
    baseline: Any = None  # {key: value}: the value that all others of a key are compared with
    selected_on: list[int] = field(default_factory=list)  # seeds that this design was chosen on


@dataclass
class RecipeConfig:
    """The model's recipe: values for keys that no preset, experiment or command line sets.

    It is chosen by the model. To change a value, set its key itself, not these.
    """

    name: str | None = None  # of the recipe; None: the defaults on this page, as of embedded bases
    values: Any = field(default_factory=dict)  # {key: value}: what the recipe would give
    applied: list[str] = field(default_factory=list)  # by lorabench: keys that nothing else sets


@dataclass
class SeedsConfig:
    """Three independent random streams, so that one can vary while the others stay."""

    init: int = 0  # initial A of every module; B too with lora.init=orthogonal
    data: int = 0  # order of the training examples
    dropout: int = 0  # masks of lora_dropout


@dataclass
class Config:
    """One run."""

    task: str = "causal_lm"  # causal_lm: generate the completion; seq_cls: classify the prompt
    model: ModelConfig = field(default_factory=ModelConfig)
    target_modules: TargetModulesConfig = field(default_factory=TargetModulesConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    start_from: str | None = None  # run or PEFT folder whose adapter is the initial one
    stages: list[Any] = field(default_factory=list)  # what trains when; see conf/stages/
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    objective: str = "validation/nll"  # split/metric that a job returns to a Hydra sweeper
    seed: int = 0  # value of the three seeds that are not set themselves
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    presets: Any = field(default_factory=dict)  # by lorabench: sha256 of files not its own, by path
    sweep: str = "default"  # name of the sweep's folder in output_dir
    output_dir: str = "outputs"  # folder of all sweeps


def steps_of_epochs(epochs: float, num_examples: int, batch_size: int) -> int:
    """Return the optimizer steps of `epochs` passes over the training examples.

    An epoch is ceil(num_examples / batch_size) steps, and a fraction of one is rounded up.
    Source: transformers' Trainer.set_initial_training_values with dataloader_drop_last=False.
    """
    return math.ceil(epochs * math.ceil(num_examples / batch_size))


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


@functools.cache
def keys(cls: type = Config, prefix: str = "") -> tuple[str, ...]:
    """Every dotted key a config can hold."""
    found: list[str] = []
    hints = get_type_hints(cls)
    for spec in fields(cls):
        found.append(prefix + spec.name)
        if is_dataclass(hints[spec.name]):
            found += keys(hints[spec.name], f"{prefix}{spec.name}.")
    return tuple(found)
