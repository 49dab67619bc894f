"""`start_from`: the adapter whose weights a run begins with. Finding it imports without torch.

Tensors that the adapter holds replace the run's own initial ones; modules it lacks keep their keyed
draw. Whatever the run could not begin with exactly is refused while it is planned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorabench import intact, record
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, and_more, first_line
from lorabench.hashes import file_hash, fresh_hash
from lorabench.runs import folder_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
EXACT = {"F32": ("float32", "float64"), "F64": ("float64",)}  # what each dtype converts to exactly


class Start(NamedTuple):
    """An adapter to begin with."""

    folder: Path  # with adapter_config.json
    hash: str  # sha256 of its weights file
    entry: record.Record | None  # of the run that trained it; None: a plain PEFT adapter


def find(word: str) -> Start:
    """Return the adapter that `start_from` means.

    Args:
        word: folder of a run, the beginning of its id, or a PEFT adapter's folder.
    Raises:
        ConfigErrors: there is none, its run has not been trained, or its files are damaged.
    """
    folder = _folder(word)
    run = folder if (folder / "record.json").exists() else folder.parent
    entry = record.read(run) if folder.name == "adapter" or run == folder else None
    if entry is not None:
        if not entry.has_trained():
            raise ConfigErrors(
                f"start_from: must be a run that was trained; '{run}' is {entry.status}; "
                f"finish it first"
            )
        if damaged := intact.of_adapter(intact.damage(run, entry, file_hash)):
            told = intact.described_damage(run, entry, damaged)
            raise ConfigErrors(f"start_from: must hold the adapter that was trained; {told}")
        folder = run / "adapter"
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigErrors(
                f"start_from: must be a trained run, or a PEFT adapter with {SETTINGS} and "
                f"{WEIGHTS}; '{folder}' has no {name}; correct the folder, or save the adapter "
                f"with safe_serialization=True"
            )
    return Start(folder, file_hash(folder / WEIGHTS), entry)


def _folder(word: str) -> Path:
    try:
        return folder_of(word)
    except ConfigErrors as refused:
        raise ConfigErrors(
            [f"start_from: {text.removeprefix('RUN: ')}" for text in refused.errors]
        ) from None


def resolved(config: Config) -> str | None:
    """Return `start_from` as the folder of a run or adapter, the beginning of an id spelled out."""
    return None if config.start_from is None else str(_folder(config.start_from))


def weights(start: Start) -> dict[str, Tensor]:
    """Read the tensors of an adapter, under PEFT's names.

    Raises:
        ConfigErrors: the file is not the one that was planned.
    """
    from safetensors.torch import load_file

    path = start.folder / WEIGHTS
    found = load_file(path)
    if fresh_hash(path) != start.hash:
        raise ConfigErrors(
            f"start_from: must still be the adapter that was planned, {start.hash[:12]}; '{path}' "
            f"was written in between; repeat the command"
        )
    return found


def put(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Overwrite a run's initial weights by those of the adapter.

    Args:
        state: what the run's pack returns as `adapter_state`: views of what it trains.
    """
    import torch

    with torch.no_grad():
        for name, tensor in tensors.items():
            state[_in_run(name, state)].copy_(tensor)


# --- whether a run can begin with it ---------------------------------------------------------


def notes(start: Start, wrapped: PeftModel) -> list[str]:
    """Say which modules a run begins with from the adapter, and which it draws."""
    from lorabench import adapters

    held = {_module(name) for name in _header(start.folder / WEIGHTS) if not _is_bias(name)}
    mine = [name for name in adapters.adapter_state(wrapped) if not _is_bias(name)]
    trained = list(dict.fromkeys(map(_module, mine)))
    drawn = [module for module in trained if module not in held]
    more = f"; drawn by seeds.init: {and_more(drawn, 3)}" if drawn else ""
    return [f"start_from: {len(trained) - len(drawn)} of {len(trained)} modules begin with "
            f"{start.folder} ({start.hash[:12]}){more}"]  # fmt: skip


def differences(
    start: Start,
    config: Config,
    skeleton: PreTrainedModel,
    wrapped: PeftModel,
    contents: Mapping[str, str],
    labels: list[str],
) -> list[str]:
    """Return everything that keeps a run from beginning with the adapter, one line each.

    Args:
        wrapped: the run's own adapter on the skeleton.
        contents: hashes of the run's base.
        labels: of a classification.
    """
    from lorabench import adapters

    found = _Found(start.folder)
    _compare_runs(found, start.entry, config, contents, labels)
    try:
        settings = adapters.read_settings(start.folder)
        theirs = adapters.wrap_skeleton(skeleton, settings)
    except (ValueError, TypeError, KeyError) as error:
        return [*found.errors, f"start_from: PEFT must be able to put '{start.folder}' on this "
                f"base; it says: {first_line(error).partition('. ')[0]}"]  # fmt: skip
    lora = config.lora
    found.must("lora.use_dora", bool(settings.use_dora), lora.use_dora)
    head = base_model.output_head(skeleton)
    mine = adapters.adapter_state(wrapped)
    header = {_in_run(n, mine): one for n, one in _header(start.folder / WEIGHTS).items()}
    if any(_is_bias(name) and not (head and _module(name) == head[0]) for name in header):
        found.must("lora.bias", settings.bias, lora.bias)
    layers, their_layers = adapters.lora_layers(wrapped), adapters.lora_layers(theirs)
    policy = _head_policy(header, head[0] if head else None)
    if policy is not None and config.task == "causal_lm":
        found.must("head", policy, config.head.policy)
    modules = list(dict.fromkeys(map(_module, mine)))
    held = list(dict.fromkeys(map(_module, header)))
    ranks: dict[tuple[Any, Any], list[str]] = {}
    scales: dict[tuple[Any, Any], list[str]] = {}
    for module in [one for one in held if one in layers and one in their_layers]:
        one, other = their_layers[module], layers[module]
        for alike, key in ((ranks, "r"), (scales, "scaling")):
            pair = tuple(getattr(layer, key)[adapters.ADAPTER] for layer in (one, other))
            if pair[0] != pair[1]:
                alike.setdefault((pair[0], pair[1]), []).append(module)
    found.must("lora.use_rslora", bool(settings.use_rslora), lora.use_rslora)
    for (a, b), where in ranks.items():
        pattern = "" if a == settings.r else "set lora.rank_pattern for them"
        found.must("lora.r", a, b, where, pattern)
    for (a, b), where in scales.items() if "lora.use_rslora" not in found.explained else ():
        remedy = "set lora.alpha_pattern for them"
        if not settings.alpha_pattern:
            remedy = f"set lora.lora_alpha={settings.lora_alpha:g}"
            remedy += " lora.alpha_ratio=null" if lora.alpha_ratio is not None else ""
        found.must("the scale of an update", a, b, where, remedy)
    if lacking := [m for m in held if m not in modules and not (head and m == head[0])]:
        found.errors.append(
            f"start_from: this run must train every module of '{start.folder}'; it does not train "
            f"{and_more(lacking, 3)}; add them to target_modules"
        )
    explained = found.explained | {m for where in ranks.values() for m in where} | set(lacking)
    if not {"lora.use_dora", "lora.bias", "head"} & found.explained:
        _compare_tensors(found, header, mine, explained)
    _compare_dtypes(found, header, config.trainer.dtype)
    return found.errors


class _Found:
    """Differences so far, and the keys and modules they explain."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.errors, self.explained = folder, [], set[str]()

    errors: list[str]

    def must(
        self, key: str, theirs: Any, mine: Any, modules: Iterable[str] = (), remedy: str = ""
    ) -> None:
        """Note a key whose value must be the adapter's.

        Args:
            remedy: other than to set the key.
        """
        if theirs == mine:
            return
        self.explained.add(key)
        where = list(modules)
        of = f" on {and_more(where, 2)}" if where else ""
        told = [f"{one:g}" if isinstance(one, float) else f"{one}" for one in (theirs, mine)]
        told = [{"True": "true", "False": "false"}.get(one, one) for one in told]
        self.errors.append(
            f"start_from: {key} must be that of '{self.folder}', {told[0]}{of}; got {told[1]}; "
            f"{remedy or f'set {key}={told[0]}'}"
        )


def _compare_runs(
    found: _Found,
    entry: record.Record | None,
    config: Config,
    contents: Mapping[str, str],
    labels: list[str],
) -> None:
    """What only the record of a run tells: its base, by content, and its labels."""
    if entry is None:
        return
    found.must("task", entry.config["task"], config.task)
    found.must("model.dtype", entry.config["model"]["dtype"], config.model.dtype)
    theirs = entry.provenance.get("weights"), entry.provenance.get("revision")
    mine = contents["weights"], contents["revision"]
    if theirs != mine:
        told = [(one[0] or one[1] or "unknown")[:12] for one in (theirs, mine)]
        found.errors.append(
            f"start_from: the base must be the one that '{found.folder}' was trained on, "
            f"{entry.config['model']['path']} ({told[0]}); got {config.model.path} ({told[1]})"
        )
    if config.task == "seq_cls":
        found.must("data.labels", entry.plan.get("labels"), labels)


def _compare_tensors(
    found: _Found,
    header: Mapping[str, tuple[list[int], str]],
    mine: Mapping[str, Any],
    explained: set[str],
) -> None:
    """Shapes and names that no setting explains: another base, or a file that is not whole."""
    left = [name for name in header if _module(name) not in explained]
    if more := [name for name in left if name not in mine]:
        found.errors.append(
            f"start_from: every tensor of '{found.folder}' must be one that this run trains; "
            f"{and_more(more, 2)} {'is' if len(more) == 1 else 'are'} not; save the adapter "
            f"without (save_embedding_layers=False)"
        )
    shapes = {name: (header[name][0], list(mine[name].shape)) for name in left if name in mine}
    if other := {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}:
        name, (theirs, own) = next(iter(other.items()))
        found.errors.append(
            f"start_from: tensors must have the shapes of this run's; '{found.folder}' has "
            f"{theirs} for {own} in {name} and {len(other)} in all: it was trained on another base"
        )
    held = {_module(name) for name in header if not _is_bias(name)}
    lost = [
        name
        for name in mine
        if _module(name) in held - explained and name not in header and not _is_bias(name)
    ]
    if lost:
        found.errors.append(
            f"start_from: a module must be in '{found.folder}' whole or not at all; it lacks "
            f"{and_more(lost, 2)}"
        )


def _compare_dtypes(
    found: _Found, header: Mapping[str, tuple[list[int], str]], trained: str
) -> None:
    """Refuse weights that would be rounded on loading."""
    held = "float64" if trained == "float64" else "float32"  # as `adapters.attach` holds them
    lossy = sorted({d for _, d in header.values() if held not in EXACT.get(d, (held,))})
    if lossy:
        found.errors.append(
            f"start_from: weights must not be rounded on loading; '{found.folder}' has {lossy[0]}, "
            f"this run trains in {held}; set model.dtype=float64"
        )


def _head_policy(header: Iterable[str], head: str | None) -> str | None:
    """The head policy under which an adapter holds what it does; None where it has no head."""
    own = [name for name in header if head is not None and _module(name) == head]
    if not own:
        return None
    return "full" if all(".lora_" not in name for name in own) else "lora"


def _header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype (as safetensors spells it) of every tensor of a file."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}


def _is_bias(name: str) -> bool:
    """Whether a saved tensor is a bias of the base, which begins as the base's where it is not."""
    return name.endswith(".bias") and ".lora_" not in name


def _in_run(name: str, mine: Mapping[str, Any]) -> str:
    """The run's name of an adapter's tensor: PEFT renames a bias whose module gets an adapter."""
    if name in mine or not _is_bias(name):
        return name
    bare = name.replace(".base_layer.bias", ".bias")
    adapted = f"{bare.removesuffix('.bias')}.base_layer.bias"
    return next((one for one in (bare, adapted) if one in mine), name)


def _module(name: str) -> str:
    """The module of the base that a saved tensor belongs to."""
    inner = name.removeprefix("base_model.model.")
    module, *own = re.split(r"\.(?:base_layer|lora_\w+)(?:\.|$)", inner, maxsplit=1)
    return module if own else inner.rpartition(".")[0]
