"""What the task decides: the model class, PEFT's task type, and which module is the head.

A base is built for a number of classes; 0 is a language model (task=causal_lm).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorabench.config import ConfigErrors, and_more

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

PEFT_TYPES = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS"}
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq_cls": "AutoModelForSequenceClassification",
}
HEADS = ("classifier", "score")  # what PEFT's SEQ_CLS trains in full and saves


def model_class(architecture: Any, classes: int, name: str) -> Any:
    """The class that transformers loads this architecture with.

    Args:
        architecture: a transformers config.
        name: the base's, for the message.
    Raises:
        ConfigErrors: transformers has no such class.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    loader: Any = transformers.AutoModelForCausalLM
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if classes:
        loader = transformers.AutoModelForSequenceClassification
        known = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(architecture) not in known:
        task, other = ("seq_cls", "causal_lm") if classes else ("causal_lm", "seq_cls")
        own = (getattr(architecture, "auto_map", None) or {}).get(AUTO_CLASSES[task])
        brought = f" (config.json names {own}, code of its own, which never runs)" if own else ""
        raise ConfigErrors(
            f"task: must be one that transformers has a model class for; got {task}, which "
            f"'{architecture.model_type}' of base model '{name}' has none for{brought}; use "
            f"task={other} or another model"
        )
    return loader


def check(skeleton: PreTrainedModel, classes: int, name: str) -> None:
    """Refuse a base that could be built for its task and yet not serve it.

    Raises:
        ConfigErrors: an encoder that sees the words it should predict; a head that is not one
            linear layer under a name that PEFT saves.
    """
    if not classes:
        # GPT-NeoX says is_decoder=False too: its attention knows better.
        causal = any(getattr(module, "is_causal", False) for module in skeleton.modules())
        if getattr(skeleton.config, "is_decoder", None) is False and not causal:
            raise ConfigErrors(
                f"task: causal_lm must have a base that sees no later token; base model '{name}' "
                f"({skeleton.config.model_type}) is an encoder; use task=seq_cls, or a checkpoint "
                f"with is_decoder=true"
            )
        return
    from torch import nn

    head = classifier(skeleton)
    if head is None or type(head[1]) is not nn.Linear:
        found = "none" if head is None else f"'{head[0]}', a {type(head[1]).__name__}"
        raise ConfigErrors(
            f"task: seq_cls must find one linear layer as head, under a name that PEFT trains and "
            f"saves ({', '.join(HEADS)}); {type(skeleton).__name__} of base model '{name}' has "
            f"{found}; use another model"
        )


def is_classifier(base: PreTrainedModel) -> bool:
    """Whether a model was built with a classification head."""
    return type(base).__name__.endswith("ForSequenceClassification")


def classifier(base: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """Name and module of the classification head."""
    children = dict(base.named_children())
    return next(((name, children[name]) for name in HEADS if name in children), None)


def needs_mask(base: PreTrainedModel) -> bool:
    """Whether padding on the right could be seen: not where all attention is known to be causal."""
    flags = [module.is_causal for module in base.modules() if hasattr(module, "is_causal")]
    return not (flags and all(flags))


def blank_head(base: PreTrainedModel, loaded: dict[str, Any], name: str) -> None:
    """Zeros in the head of the frozen base: every load has the same bytes; each run draws its own.

    Args:
        loaded: what transformers says of the loading.
    Raises:
        ConfigErrors: another weight would be as random as the head.
    """
    import torch

    head = classifier(base)
    assert head is not None, "checked on the skeleton"
    mismatched = {key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]}
    random = sorted({*loaded["missing_keys"], *mismatched})
    random = [key for key in random if not key.startswith(f"{head[0]}.")]
    if random:
        raise ConfigErrors(
            f"model.path: with task=seq_cls a checkpoint must hold every weight but the head's; "
            f"'{name}' lacks {and_more(random, 4)}, which would be random in every load; "
            f"use a checkpoint that has them, or save this one once as {type(base).__name__}"
        )
    with torch.no_grad():
        for parameter in head[1].parameters():
            parameter.zero_()
