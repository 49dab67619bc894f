"""What a run's adapter can be written as, from its plan: adapter, merged, gguf.

Imports without torch. For gguf it is a prediction: what llama.cpp's convert_lora_to_gguf.py takes,
and what llama.cpp then loads, read in their sources (convert_lora_to_gguf.py, conversion/,
llama-adapter.cpp) and in the tables of the `gguf` package they ship.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lorabench import tasks
from lorabench.config import LoraSettings, and_more, did_you_mean, lora_alpha

YES = "yes"
KINDS = ("adapter", "merged", "gguf")
# transformers' model_type -> gguf's architecture, where the names differ by more than "-" and "_".
RENAMED = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "falcon_mamba": "mamba",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4",
    "glm": "chatglm",
    "gpt-sw3": "gpt2",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "llama4_text": "llama4",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen3_5_text": "qwen35",
}
# gguf knows the architecture, but the converter does not register transformers' causal class.
UNREGISTERED = {"bert", "bitnet", "exaone_moe", "gptj", "mpt", "phimoe"}
CONV1D = ("c_attn", "c_proj", "c_fc")  # GPT-2's, stored (in, out)
CLASS_HEAD = "classification head"
HEADLESS = "its head is its embeddings, merged or not"


def predict(
    base: Any,
    modules: Sequence[str],
    saved_modules: Sequence[str],
    lora: LoraSettings,
    head: str | None,
    tied: bool,
) -> dict[str, str]:
    """`yes` or the reason why not, for each of KINDS.

    A finished run's folder holds a plain PEFT adapter, and whatever PEFT trains here it merges;
    a tied head is untied first (`lorabench export`).
    """
    return {
        "adapter": YES,
        "merged": YES,
        "gguf": gguf(base, modules, saved_modules, lora, head, tied),
    }


def gguf(
    base: Any,
    modules: Sequence[str],
    saved_modules: Sequence[str],
    lora: LoraSettings,
    head: str | None,
    tied: bool,
) -> str:
    """Whether the adapter becomes a GGUF that does what the adapter does: `yes`, or every reason.

    Args:
        base: the base's transformers config.
        modules: full names of the modules with LoRA.
        saved_modules: full names of the modules trained in full.
        head: full name of the output layer.
        tied: whether its weight is the embedding's.
    """
    if head in tasks.HEADS:
        return f"llama.cpp's adapters hold LoRA alone: the {CLASS_HEAD} is trained in full"
    arch = gguf_architecture(base)
    if arch is None:
        return (
            f"llama.cpp's converter knows no causal model of the type '{base.model_type}' "
            f"({', '.join(base.architectures or ['config.json names no architectures'])})"
        )
    import gguf as package

    reasons = []
    name = package.MODEL_ARCH_NAMES[arch]
    tensors = package.get_tensor_name_map(arch, base.get_text_config().num_hidden_layers)
    found = {m: tensors.get_name(m.replace("language_model.", "")) for m in modules if m != head}
    on_embeddings = package.TENSOR_NAMES[package.MODEL_TENSOR.TOKEN_EMBD] in found.values()
    headless = package.MODEL_TENSOR.OUTPUT not in package.MODEL_TENSORS[arch]
    if headless and (head in {*modules, *saved_modules} or on_embeddings):
        reasons.append(f"a GGUF of {name} has no output tensor: {HEADLESS}")
    elif tied and head in modules:
        reasons.append(
            "LoRA on a tied head becomes output.weight.lora_a and _b, and the GGUF of the tied "
            "base has no output.weight to load them on"
        )
    elif tied and on_embeddings:
        reasons.append(
            "llama.cpp finds an adapter by its tensor's name, and would put that of the embeddings "
            "on the tied head as well"
        )
    unmapped = [module for module, tensor in found.items() if tensor is None]
    if unmapped:
        reasons.append(f"a GGUF of {name} has no tensor for {and_more(unmapped)}")
    if name == "gpt2" and any(m.rpartition(".")[2] in CONV1D for m in modules):
        reasons.append(
            f"the converter transposes GPT-2's {', '.join(CONV1D)}, and the adapter's A and B with "
            f"them, which PEFT does not store transposed"
        )
    if lora.use_dora:
        reasons.append("the converter refuses DoRA's magnitudes")
    if lora.bias != "none":
        reasons.append(f"the converter refuses trained biases (lora.bias={lora.bias})")
    in_full = [module for module in saved_modules if not (headless and module == head)]
    if in_full:
        reasons.append(f"the converter refuses modules trained in full ({', '.join(in_full)})")
    return "; ".join([*reasons, *_scale_reasons(lora)]) or YES


def _scale_reasons(lora: LoraSettings) -> list[str]:
    """A GGUF has one alpha and scales every module by alpha / its rank."""
    reasons = []
    alphas = {alpha for alpha in (lora.alpha_pattern or {}).values() if alpha != lora_alpha(lora)}
    if alphas:
        reasons.append("a GGUF holds one alpha: lora.alpha_pattern would be ignored")
    if lora.use_rslora:
        ranks = {r for r in (lora.rank_pattern or {}).values() if r != lora.r}
        fix = "" if ranks or alphas else " (one rank: an alpha of alpha * sqrt(r) would be right)"
        reasons.append(f"a GGUF scales by alpha / r, rsLoRA by alpha / sqrt(r){fix}")
    return reasons


def gguf_architecture(base: Any) -> Any | None:
    """The `gguf.MODEL_ARCH` the converter takes a base for; None where it takes none."""
    import gguf as package

    if not base.architectures or base.model_type in UNREGISTERED:
        return None
    wanted = _plain(RENAMED.get(base.model_type, base.model_type))
    found = {_plain(name): arch for arch, name in package.MODEL_ARCH_NAMES.items()}
    return found.get(wanted)


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name)


def way_out(reason: str, run: str) -> str:
    """How to get a GGUF all the same."""
    if HEADLESS in reason:
        return (
            "train with head=exclude and leave the embeddings alone; --to merged keeps them apart "
            "for transformers, its GGUF would not"
        )
    if CLASS_HEAD in reason:
        return (
            f"lorabench export {run} --to merged PATH, for transformers; of classifiers "
            f"llama.cpp's converter takes BERT's kind alone"
        )
    return f"lorabench export {run} --to merged PATH, then llama.cpp's convert_hf_to_gguf.py PATH"


def check_kind(kind: str) -> list[str]:
    """What is wrong with `--to`."""
    if kind in KINDS:
        return []
    return [f"--to: must be one of {', '.join(KINDS)}; got {did_you_mean(kind, KINDS)}"]
