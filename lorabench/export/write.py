"""Adapter and merged folders: written beside their place, reloaded, checked, then put there.

The references are stock: PEFT attaches the adapter to the base, and transformers reloads what was
written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lorabench import adapters, data, machine, provenance
from lorabench import model as base_model
from lorabench.config import ConfigErrors
from lorabench.data import sources
from lorabench.export import agreement
from lorabench.export.source import Run
from lorabench.files import share, sync_folder

# Of the largest logit. Merging rounds each weight once more, 6e-8 of its size: 4e-7 to 9e-7 were
# seen where all else was float64. Float32's arithmetic adds 1e-6 to 1e-5 on each side: where
# float32 logits differ by more than this, the same weights are compared in float64 arithmetic.
# A head merged while tied is off by a hundredth and more.
MAX_DIFFERENCE = 1e-5
# Rounding to nearest errs by u^2/12 a weight, on average, and a stochastic draw by u^2/6 (u: the
# gap between the dtype's values), both only where the dtype does not hold the number. KL grows with
# the square of the error, so half of a draw's is expected, and less where updates are smaller than
# u; twice a draw's leaves room for the luck of one draw.
ROUNDING_FACTOR = 2
DRAWS = 4  # few positions make most of a KL, so that one draw may be a third of what rounding gives
FLOAT32_KL = 1e-10  # nats: what float32 itself gives at MAX_DIFFERENCE of a logit of about 1
MAX_EXAMPLES, MAX_TOKENS = 8, 64  # of the run's own test examples: logits of large vocabularies


def to_adapter(run: Run, path: Path) -> dict[str, Any]:
    """Copy the adapter; the copy is loaded by plain PEFT before it is in place.

    Returns:
        What was checked: the content of export.json.
    """
    machine.configure_torch(run.config)
    base = _base(run, run.config.model.dtype)
    with _whole_or_nothing(path) as part:
        shutil.copytree(run.folder / "adapter", part, dirs_exist_ok=True)
        _name_base(part / "adapter_config.json", base_model.location(run.model))
        wrapped = _attach(base, run, part)
        tensors = adapters.adapter_state(wrapped)
        report = _report(run, "adapter", {"modules": len(wrapped.targeted_module_names)})
        report["checks"]["tensors"] = len(tensors)
        _write_report(part, report)
    return report


def to_merged(run: Run, path: Path, dtype_name: str) -> dict[str, Any]:
    """Write base and adapter as one transformers folder whose logits are the adapter's.

    Args:
        dtype_name: of the weights on disk; everything is computed in float32.
    Returns:
        What was checked: the content of export.json.
    Raises:
        ConfigErrors: the logits are not the adapter's, or the embeddings changed; nothing is left.
    """
    machine.configure_torch(run.config)
    dtype = base_model.dtype(dtype_name)
    tokenizer = base_model.tokenizer(run.model)
    model = _base(run, "float32")
    batches, checked_on = _batches(run, model, tokenizer)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    adapted = name in run.entry.plan["lora_modules"]
    kept = None if adapted else embedding.weight.detach().clone()
    tied = base_model.is_tied(model)

    untrained = agreement.logits(model, batches)
    wrapped = _attach(model, run, run.folder / "adapter")
    reference = agreement.logits(wrapped, batches)
    model = merge(wrapped)
    checks: dict[str, Any] = {
        "on": checked_on,
        "adapter_kl": agreement.divergence(reference, untrained).kl,  # what the run changed
        "max_difference": MAX_DIFFERENCE,
        "merged": _must_agree("merged", run, model, reference, batches),
        "untied": tied and not base_model.is_tied(model),
        "embeddings_unchanged": _must_keep(kept, model),
    }
    drawn = _round(model, dtype, batches) if dtype != torch.float32 else None
    report = _report(run, "merged", checks) | {"dtype": dtype_name}
    with _whole_or_nothing(path) as part:
        model.save_pretrained(part)
        if run.template is not None:  # how it was trained is how it is to be asked
            tokenizer.chat_template = run.template
        tokenizer.save_pretrained(part)
        del model, wrapped, embedding  # one model at a time
        again, found = run.auto_class.from_pretrained(
            part, dtype=torch.float32, output_loading_info=True, **base_model.NO_CODE
        )
        lacking = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
        if lacking:
            raise ConfigErrors(f"export: the written folder must load whole; it has {lacking}")
        again.eval()
        _must_keep(None if kept is None else kept.to(dtype).float(), again)
        if drawn is None:
            checks["reloaded"] = _must_agree("reloaded", run, again, reference, batches)
        else:
            reloaded = agreement.logits(again, batches)
            checks["rounding"] = _must_only_be_rounded(dtype_name, reference, reloaded, drawn)
        _write_report(part, report)
    return report


def merge(wrapped: PeftModel) -> Any:
    """The base with its adapter merged in; a tied head that no longer is the embedding is untied.

    PEFT adds the update to the weight itself: on a tied one, to embedding and head alike.
    """
    tree: Any = wrapped.get_base_model()
    head, embedding = tree.get_output_embeddings(), tree.get_input_embeddings()
    was_tied = head is not None and _weight(head) is _weight(embedding)
    layers = adapters.lora_layers(wrapped).values()
    if was_tied and any(layer is head or layer is embedding for layer in layers):
        _untie(tree)
    with _pefts_warnings_off():
        merged: Any = wrapped.merge_and_unload()
    if was_tied and not base_model.is_tied(merged):  # a head trained in full unties as well
        _untie(merged)
    return merged.eval()


def _weight(layer: Any) -> Any:
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return getattr(base, "original_module", base).weight


def _untie(tree: Any) -> None:
    """A parameter of its own in each place, and configs that say so.

    Not the head's weight alone: with the flag off, transformers ties nothing on loading, and
    would save only one name of what still is one tensor (BERT's head has a tied bias too).
    """
    seen: set[int] = set()
    for name, parameter in list(tree.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:
            owner, _, leaf = name.rpartition(".")
            own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(tree.get_submodule(owner), leaf, own)
        seen.add(id(parameter))
    for config in (tree.config, tree.config.get_text_config()):
        config.tie_word_embeddings = False


@contextmanager
def _pefts_warnings_off() -> Iterator[None]:
    """Of tied layers, which are seen to here, and of renamed calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _base(run: Run, dtype_name: str) -> Any:
    """The run's base, as stock transformers loads it for the run's task."""
    base = base_model.plain(run.model, run.auto_class, dtype_name, **run.auto_options)
    if run.auto_options:  # decoders pool the last token that is not padding
        base.config.get_text_config().pad_token_id = data.pad_id(base_model.tokenizer(run.model))
    return base


# --- checks ----------------------------------------------------------------------------------


def _attach(base: Any, run: Run, folder: Path) -> PeftModel:
    """Base and adapter by plain PEFT: every tensor the record's, every one of them loaded."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) if file.is_file() else {}
    found, wanted = adapters.state_hash(tensors), run.entry.hashes["adapter"]
    if found != wanted:
        raise ConfigErrors(
            f"RUN: its adapter must be the one it trained, hash {wanted}; '{run.folder}' has "
            f"{found if tensors else 'none'}; train it again"
        )
    with _pefts_warnings_off():
        wrapped = PeftModel.from_pretrained(base, str(folder)).eval()
    loaded = adapters.adapter_state(wrapped)
    modules, planned = set(wrapped.targeted_module_names), set(run.entry.plan["lora_modules"])
    same = loaded.keys() == tensors.keys() and all(
        torch.equal(tensor, tensors[name].to(tensor.dtype)) for name, tensor in loaded.items()
    )
    if not same or modules != planned:
        raise ConfigErrors(
            f"export: PEFT must load the adapter's {len(tensors)} tensors on {len(planned)} "
            f"modules; it has {len(loaded)} on {len(modules)}, or other numbers; use the versions "
            f"in the record"
        )
    return wrapped


def _batches(run: Run, model: Any, tokenizer: Any) -> tuple[list[Tensor], str]:
    """Token ids to compare logits on, and what they are."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    seeded = agreement.seeded_batch(model.get_input_embeddings().num_embeddings, positions)
    own: list[Tensor] = []
    settings = run.data_settings
    try:
        # Read only where that needs no network.
        if away := sources.remote_paths(settings):
            raise ConfigErrors(f"{away[0]} lies on the hub")
        scored = {e.splits["test"].examples for e in run.entry.evaluations if "test" in e.splits}
        if data.content_hashes(settings)["test"] not in scored:
            raise ConfigErrors("the data has changed since")
        examples = data.load(settings).test[:MAX_EXAMPLES]
        labels = run.entry.plan.get("labels")
        tokens = (
            data.classify(examples, tokenizer, settings, labels)
            if labels
            else data.tokenise(examples, tokenizer, settings, _stops(run))
        )
        own = [torch.tensor([ids[:MAX_TOKENS]]) for ids in tokens.input_ids]
        said = f"{len(own)} test examples"
    except ConfigErrors as error:
        said = f"no test example ({error.errors[0]})"
    rows, length = seeded.shape
    return [seeded, *own], f"{rows} x {length} random tokens, {said}"


def _stops(run: Run) -> list[int]:
    """Return where turns may end, of a run whose data are conversations."""
    return json.loads(run.entry.plan["contents"].get("stops", "[]"))


def _must_agree(
    what: str, run: Run, model: Any, reference: list[Tensor], batches: list[Tensor]
) -> dict[str, float]:
    """Largest difference of a float32 model's logits over the largest logit, by arithmetic."""
    found = {"float32": agreement.relative_difference(reference, agreement.logits(model, batches))}
    if not found["float32"] <= MAX_DIFFERENCE:  # the weights, or the arithmetic?
        base = _base(run, "float32")
        adapter = _attach(base, run, run.folder / "adapter").double()
        exact = agreement.logits(adapter, batches)
        del base, adapter
        found["float64"] = agreement.relative_difference(
            exact, agreement.logits(model.double(), batches)
        )
        model.float()  # the same numbers as before
    if not min(found.values()) <= MAX_DIFFERENCE:
        raise ConfigErrors(
            f"export: the {what} model's logits must be the adapter's to {MAX_DIFFERENCE:g} of "
            f"the largest; they differ by {found['float32']:.1e}, in float64 arithmetic by "
            f"{found['float64']:.1e}; nothing is left"
        )
    return found


def _must_keep(kept: Tensor | None, model: Any) -> bool:
    """The embeddings bit for bit, unless the run trained an adapter on them (kept is None)."""
    if kept is not None and not torch.equal(model.get_input_embeddings().weight.detach(), kept):
        raise ConfigErrors(
            "export: merging must leave the embeddings as they are; they changed; nothing is left"
        )
    return kept is not None


def _round(model: Any, dtype: torch.dtype, batches: list[Tensor]) -> list[list[Tensor]]:
    """Round the model to nearest, and give the logits of stochastic draws in its place."""
    generator = torch.Generator().manual_seed(0)
    exact = [parameter.data for parameter in model.parameters()]
    draws = []
    for _ in range(DRAWS):
        for parameter, weight in zip(model.parameters(), exact, strict=True):
            parameter.data = agreement.round_stochastically(weight, dtype, generator)
        draws.append(agreement.logits(model, batches))
    for parameter, weight in zip(model.parameters(), exact, strict=True):
        parameter.data = weight.to(dtype)
    model.to(dtype)  # buffers
    return draws


def _must_only_be_rounded(
    dtype_name: str, reference: list[Tensor], reloaded: list[Tensor], drawn: list[list[Tensor]]
) -> dict[str, Any]:
    """Hold the stored model to what rounding its weights does by itself.

    KL to twice that of the stochastic draw that has the most; and another token may come first only
    where the adapter's own logits of the two are so close that both moving by twice that draw's
    largest change swaps them.
    """
    found = agreement.divergence(reference, reloaded)
    draw = max((agreement.divergence(reference, one) for one in drawn), key=lambda one: one.kl)
    max_kl = max(ROUNDING_FACTOR * draw.kl, FLOAT32_KL)
    max_gap = 2 * ROUNDING_FACTOR * draw.change
    if not (found.kl <= max_kl and found.gap <= max_gap):
        raise ConfigErrors(
            f"export: stored in {dtype_name}, the model must differ from the adapter by rounding "
            f"alone, KL at most {max_kl:.1e}; it has {found.kl:.1e}, and another best token where "
            f"the adapter's leads by {found.gap:.1e} (at most {max_gap:.1e}); nothing is left"
        )
    return {
        **dataclasses.asdict(found),
        "max_kl": max_kl,
        "max_gap": max_gap,
        "draw": dataclasses.asdict(draw),
    }


# --- files -----------------------------------------------------------------------------------


@contextmanager
def _whole_or_nothing(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` at the end, and is gone if anything fails."""
    place = path.absolute()
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        share(part)
        sync_folder(part)
        if place.is_dir():
            place.rmdir()  # empty, or this fails
        part.rename(place)
    except OSError as error:
        raise ConfigErrors(f"PATH: must be writable; '{path}' is not: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _name_base(file: Path, where: str) -> None:
    """Say in an adapter's config where its base is now; PEFT's Auto classes load it from there."""
    content = json.loads(file.read_text())
    content["base_model_name_or_path"] = where
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _report(run: Run, kind: str, checks: dict[str, Any]) -> dict[str, Any]:
    origin = run.entry.provenance
    return {
        "to": kind,
        "run_id": run.entry.run_id,
        "base": {key: origin[key] for key in ("hub", "revision", "weights")}
        | {"path": run.model.path},
        "adapter": run.entry.hashes["adapter"],
        "packages": provenance.versions(),
        "checks": checks,
    }


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    (folder / "export.json").write_text(json.dumps(report, indent=2) + "\n")
