"""What a user may write, checked: dataclasses of the groups, their ranges, all errors at once."""

from lorabench.config.build import register, typed
from lorabench.config.choices import HIGHER_IS_BETTER
from lorabench.config.errors import (
    ConfigErrors,
    and_more,
    did_you_mean,
    first_line,
    nearest,
    split_refusal,
)
from lorabench.config.ranges import range_errors
from lorabench.config.schema import (
    Config,
    DataConfig,
    HeadConfig,
    LoraSettings,
    ModelConfig,
    SeedsConfig,
    SourceConfig,
    TargetModulesConfig,
    TrackerConfig,
    TrainerConfig,
    WorkerConfig,
    flatten,
    keys,
    lora_alpha,
    model_name,
    scale,
    steps_of_epochs,
)

__all__ = [
    "HIGHER_IS_BETTER",
    "Config",
    "ConfigErrors",
    "DataConfig",
    "HeadConfig",
    "LoraSettings",
    "ModelConfig",
    "SeedsConfig",
    "SourceConfig",
    "TargetModulesConfig",
    "TrackerConfig",
    "TrainerConfig",
    "WorkerConfig",
    "and_more",
    "did_you_mean",
    "first_line",
    "flatten",
    "keys",
    "lora_alpha",
    "model_name",
    "nearest",
    "range_errors",
    "register",
    "scale",
    "split_refusal",
    "steps_of_epochs",
    "typed",
]
