"""Which modules get an adapter: names checked here by PEFT's own rules, PEFT gets the list."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from lorabench import model as base_model
from lorabench.adapters import anatomy
from lorabench.config import Config, ConfigErrors, and_more, did_you_mean, model_name, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = {"attn", "self_attn", "attention", "self_attention", "cross_attn", "crossattention"}


def resolve_modules(skeleton: PreTrainedModel, config: Config) -> list[str]:
    """Every module that gets a LoRA adapter, by full name, in the model's order.

    Routers of experts and what lies outside the text model are left out, unless select=custom
    names them.

    Args:
        skeleton: the base model on the meta device.
    Raises:
        ConfigErrors: a name matches nothing, or nothing is left to adapt.
    """
    targets, label = config.target_modules, model_name(config.model)
    head = base_model.output_head(skeleton)
    head_name = head[0] if head else None
    aside = anatomy.towers(skeleton) | anatomy.routers(skeleton)
    linear = [
        name
        for name, module in skeleton.named_modules()
        if anatomy.is_linear(module) and name != head_name and name not in aside
    ]
    as_experts = _named_like_experts(skeleton, linear)
    linear = [name for name in linear if name not in as_experts]
    worth_naming = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    if targets.select == "auto":
        model_type = skeleton.config.model_type
        if model_type not in PEFT_TARGETS:
            raise ConfigErrors(
                f"target_modules: PEFT has default modules for {len(PEFT_TARGETS)} architectures, "
                f"'{model_type}' is not among them; use target_modules=all-linear, or "
                f"target_modules=custom with target_modules.names out of: {worth_naming}"
            )
        chosen = [
            name
            for name in _matching(PEFT_TARGETS[model_type], skeleton)
            if name not in aside and name not in as_experts
        ]
    elif targets.select == "attention":
        chosen = [name for name in linear if _is_attention(name)]
    elif targets.select == "mlp":
        chosen = [n for n in linear if re.search(r"\.\d+\.", n) and not _is_attention(n)]
    elif targets.select == "all-linear":
        chosen = linear
    else:
        chosen = _named(skeleton, targets.names, aside, label)
        if as_experts := _named_like_experts(skeleton, chosen):
            raise ConfigErrors(
                f"target_modules.names: PEFT takes {and_more(map(repr, as_experts))} for the "
                f"experts of base model '{label}', which get no adapter; got "
                f"{targets.names!r}; leave it out"
            )
    if not chosen:
        raise ConfigErrors(
            f"target_modules: '{targets.select}' must match a linear layer of base model "
            f"'{label}'; it matches none; use target_modules=custom with "
            f"target_modules.names out of: {worth_naming}"
        )
    if head_name in chosen and targets.select == "custom":
        if config.task == "seq_cls":
            raise ConfigErrors(
                f"target_modules.names: must leave out the head ({head_name}), which task=seq_cls "
                f"trains in full; got {targets.names!r}"
            )
        raise ConfigErrors(
            f"target_modules.names: the head ({head_name}) belongs to the head policy; got "
            f"{targets.names!r}; leave it out and use head=lora"
        )
    _must_match("target_modules.exclude", targets.exclude, chosen, "an adapted module", label)
    adapted = [n for n in chosen if not any(_ends_with(n, e) for e in targets.exclude)]
    if config.head.policy == "lora":
        if head_name is None:
            raise ConfigErrors(f"head: base model '{label}' has no head; use head=exclude")
        adapted.append(head_name)
    if not adapted:
        raise ConfigErrors(
            "target_modules.exclude: must leave at least one module to adapt; it takes them all"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        _must_be_used(f"lora.{key}", list(getattr(config.lora, key) or ()), adapted, label)
    return adapted


def notes(skeleton: PreTrainedModel, adapted: list[str]) -> list[str]:
    """What of the base gets no adapter, or one without effect, and might be thought to have one."""
    head = base_model.output_head(skeleton)
    tree = dict(skeleton.named_modules())
    towers, routers = anatomy.towers(skeleton), anatomy.routers(skeleton)
    linear = [n for n in tree if anatomy.is_linear(tree[n]) and n != (head[0] if head else "")]
    unasked = set(linear) - set(adapted)
    outside = [name for name in towers if name in unasked]
    matrices = [
        f"{holder}.{name}"
        for holder in anatomy.experts(skeleton)
        for name, parameter in tree[holder].named_parameters(recurse=False)
        if parameter.dim() == 3
    ]
    left = [
        ("expert parameter", matrices, "no linear layers"),
        ("router", [n for n in routers if not anatomy.is_linear(tree[n])], "no linear layers"),
        ("router", [n for n in routers if n in unasked], "left out unless asked for by name"),
        ("linear layer", _named_like_experts(skeleton, linear), "PEFT reads the name as experts'"),
        ("linear layer", outside, "outside the text model, left out unless asked for by name"),
    ]
    found = [
        f"no adapter on {len(names)} {what}{'s' if len(names) > 1 else ''} (such as {names[0]}): "
        f"{why}"
        for what, names, why in left
        if names
    ]
    if idle := anatomy.uncalled(skeleton, adapted):
        found.append(
            f"target_modules: an adapter on {and_more(idle, 1)} changes nothing: the base "
            f"multiplies by that weight without calling the layer; set "
            f"'target_modules.exclude=[{idle[0].rpartition('.')[2]}]'"
        )
    return found


def _is_attention(name: str) -> bool:
    return not ATTENTION.isdisjoint(name.split("."))


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _matching(names: Iterable[str] | str, skeleton: PreTrainedModel) -> list[str]:
    """The modules that PEFT matches: name endings in a list, a regex over whole names in a str."""
    wanted = LoraConfig(target_modules=names if isinstance(names, str) else list(names))
    modules = (name for name, _ in skeleton.named_modules() if name)
    return [name for name in modules if check_target_module_exists(wanted, name)]


def _named(
    skeleton: PreTrainedModel, names: list[str] | str, aside: dict[str, str], label: str
) -> list[str]:
    """The modules that target_modules.names asks for.

    Routers and towers are asked for by an entry in which the part of their name that makes them
    one stands ("vision_tower.*q_proj", not "q_proj"), or by a regex that matches nothing else.

    Args:
        aside: modules that are left out unless asked for, with that part of their name.
    """
    key, modules = "target_modules.names", [name for name, _ in skeleton.named_modules() if name]
    if isinstance(names, str):
        _must_compile(key, names)
        if not _matching(names, skeleton):
            leaves = {n.rpartition(".")[2] for n in modules}
            near = nearest(max(re.findall(r"\w+", names), key=len, default=""), leaves)
            raise ConfigErrors(
                f"{key}: a regex must match the whole name of a module of base model '{label}'; "
                f"{names!r} matches none"
                + (f" (did you mean '.*\\.{near[0]}', or a list: [{near[0]}]?)" if near else "")
            )
    else:
        _must_match(key, names, modules, "a module", label)
    chosen: set[str] = set()
    for entry in [names] if isinstance(names, str) else names:
        found = _matching(entry if isinstance(names, str) else [entry], skeleton)
        plain = [name for name in found if name not in aside]
        alone = isinstance(names, str) and not plain
        asked = [n for n in found if n in aside and (alone or n == entry or _says(entry, aside[n]))]
        if not plain and not asked:
            raise ConfigErrors(
                f"{key}: '{entry}' matches only {and_more(map(repr, found))} of base model "
                f"'{label}', left out unless asked for; leave it out, or ask by writing "
                f"'{aside[found[0]]}' into it"
            )
        chosen |= {*plain, *asked}
    return [name for name in modules if name in chosen]


def _says(entry: str, part: str) -> bool:
    """Whether a part of a module's name stands in an entry as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", entry) is not None


def _known(modules: list[str]) -> list[str]:
    leaves = {name.rpartition(".")[2] for name in modules}
    return sorted(leaf for leaf in leaves | set(modules) if not leaf.isdigit())


def _must_match(key: str, names: list[str], modules: list[str], what: str, label: str) -> None:
    unmatched = [n for n in names if not any(_ends_with(module, n) for module in modules)]
    if unmatched:
        raise ConfigErrors(
            f"{key}: every name must match {what} of base model '{label}'; unmatched: "
            + ", ".join(did_you_mean(name, _known(modules)) for name in unmatched)
        )


def _must_compile(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigErrors(
            f"{key}: must be a regular expression; got {pattern!r}: {error}"
        ) from error


def _must_be_used(key: str, patterns: list[str], adapted: list[str], label: str) -> None:
    """Refuse an entry of rank_pattern or alpha_pattern that PEFT would use for no module.

    PEFT gives a module the value of the first entry that matches its name or the end of it.
    """
    for pattern in patterns:
        _must_compile(key, pattern)
    used = {get_pattern_key(patterns, name) for name in adapted}
    for pattern in patterns:
        if pattern in used:
            continue
        hidden_by = {
            get_pattern_key(patterns, name)
            for name in adapted
            if get_pattern_key([pattern], name) == pattern
        }
        if hidden_by:
            raise ConfigErrors(
                f"{key}: PEFT uses the first entry that matches a module; '{pattern}' comes behind "
                f"'{min(hidden_by)}', which takes all of its modules; put it in front"
            )
        raise ConfigErrors(
            f"{key}: every entry must match an adapted module of base model '{label}'; unmatched: "
            f"{did_you_mean(pattern, _known(adapted))}"
        )


def _named_like_experts(skeleton: PreTrainedModel, names: list[str]) -> list[str]:
    """The linear layers that PEFT cannot be asked to adapt: it reads their names as experts'.

    On bases whose experts became 3-D parameters in transformers 5, PEFT rewrites the names that
    experts had before, wherever they stand: shared experts and dense layers have them too.
    """
    taken = {}
    for leaf in {name.rpartition(".")[2] for name in names}:
        probe = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(probe, skeleton, None)
            taken[leaf] = bool(probe.target_parameters)
        except ValueError:  # one of two names that PEFT fuses, without the other
            taken[leaf] = True
    return [name for name in names if taken[name.rpartition(".")[2]]]
