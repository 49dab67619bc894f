"""The values that a key can take, and what is found wrong with those that came."""

from __future__ import annotations

from typing import Any

from lorabench.config.errors import did_you_mean

FORMATS = ("prompt_completion", "messages", "sharegpt", "text")
SAMPLE_BY = ("document", "paragraph", "line")
TASKS = ("causal_lm", "seq_cls")
DTYPES = ("float64", "float32", "bfloat16")
AUTO = "auto"  # of model.dtype and trainer.dtype, until a checkpoint is looked at
METRICS_OF = {
    "causal_lm": ("nll", "exact_match", "nll_per_token", "answer", "answer_flexible", "gym"),
    "seq_cls": ("nll", "accuracy"),
}
METRICS = tuple(dict.fromkeys(name for names in METRICS_OF.values() for name in names))
# Metrics where more is better; of the others less is.
HIGHER_IS_BETTER = {"exact_match", "answer", "answer_flexible", "accuracy", "gym"}
# The values that a key can take, or the elements of a list.
CHOICES: dict[str, tuple[str, ...]] = {
    "task": TASKS,
    "model.dtype": (*DTYPES, AUTO),
    "model.attn_implementation": (
        "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3",
        "a kernel of the Hub as ORG/NAME@COMMIT",
    ),
    "target_modules.select": ("auto", "attention", "mlp", "all-linear", "custom"),
    "head.policy": ("exclude", "lora", "full"),
    "lora.bias": ("none", "lora_only", "all"),
    "lora.init": ("default", "gaussian", "olora", "orthogonal", "pissa"),
    "data.source": ("skills", "gym", "jsonl", "hub", "path"),
    "data.train.sample_by": SAMPLE_BY,
    "data.validation.sample_by": SAMPLE_BY,
    "data.test.sample_by": SAMPLE_BY,
    "data.format": FORMATS,
    "data.system": ("template", "fold", "drop"),
    "data.loss_on": ("all", "last"),
    "data.too_long": ("leave_out", "cut_prompt"),
    "data.metric": METRICS,
    "trainer.keep": ("last", "best"),
    "trainer.schedule": ("constant", "linear", "cosine"),
    "trainer.compile": ("auto", "never", "always"),
    "trainer.dtype": (*DTYPES, AUTO),
    "tracker.kind": ("wandb", "trackio", "tensorboard", "none"),
    "tracker.mode": ("offline", "online", "disabled"),
}


class Found:
    """The errors so far, and the two laws most of them break."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def must(self, holds: bool, key: str, law: str, got: Any, remedy: str = "") -> None:
        if not holds:
            remedy = f"; {remedy}" if remedy else ""
            self.errors.append(f"{key}: must be {law}; got {got!r}{remedy}")

    def one_of(self, key: str, got: str) -> None:
        allowed = CHOICES[key]
        if got not in allowed:
            self.errors.append(
                f"{key}: must be one of {', '.join(allowed)}; got {did_you_mean(str(got), allowed)}"
            )
