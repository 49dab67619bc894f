"""From saved adapters to evaluations: load if need be, score packed, append to the record."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorabench import adapters, arrays, data, identity, intact, machine, provenance, record
from lorabench.config import ConfigErrors, first_line, parts
from lorabench.files import sync
from lorabench.lease import Lost
from lorabench.progress import Display
from lorabench.sweep import Job
from lorabench.worker.members import Member, what_failed
from lorabench.worker.shared import Dataset, Shared
from lorabench.worker.training import make_pack

log = logging.getLogger(__name__)


def load_pack(
    members: Sequence[Member], slots: Sequence[Job], shared: Shared
) -> tuple[Any, dict[str, str]]:
    """Put saved adapters on their base, in the shape of their pack.

    Returns:
        The pack, and by run id what is wrong with adapters that were left out.
    Raises:
        ConfigErrors: the base is not the one they were trained on.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lorabench.pack import ModulePack

    config = members[0].job.config
    machine.configure_torch(config)
    device = machine.choose_device(config.trainer.device)
    saved, errors = {}, {}
    for member in members:
        place, wanted = member.folder / "adapter", member.entry.hashes["adapter"]
        try:
            tensors = load_file(place / "adapter_model.safetensors")
            found = adapters.state_hash(tensors)[:12]
        except (OSError, SafetensorError) as error:
            found = first_line(error)
        if found == wanted[:12]:
            saved[member.slot] = tensors
        else:
            errors[member.entry.run_id] = (
                f"adapter: must be the one that run {member.entry.run_id} trained, {wanted[:12]}; "
                f"'{place}' has {found}; remove '{member.folder}' and repeat the command that "
                f"trained it"
            )
    if not saved:
        return None, errors
    if slots[0].plan.alone is not None:
        base, checksum = shared.base(slots[0], device)
        if members[0].entry.hashes["base"] != checksum:
            raise ConfigErrors(_other_base(members[0], checksum))
        return ModulePack.of_saved(base, config, members[0].folder / "adapter", device), errors
    pack, _, checksum = make_pack(shared, slots, device)
    for member in members:
        if member.entry.hashes["base"] != checksum:
            raise ConfigErrors(_other_base(member, checksum))
    for slot, tensors in saved.items():
        pack.load_adapter(slot, tensors)
    return pack, errors


def _other_base(member: Member, checksum: str) -> str:
    return (
        f"model.path: must be the base that run {member.entry.run_id} was trained on, checksum "
        f"{member.entry.hashes['base'][:12]}; '{member.job.config.model.path}' has "
        f"{checksum[:12]}; put that base back"
    )


def score(
    members: Sequence[Member], evaluation: str, pack: Any, shared: Shared, display: Display
) -> dict[str, str]:
    """Score the members on every split and append the evaluation to their records.

    Short memory halves the batch; a single example that does not fit is an error.

    Args:
        members: runs that are to be scored with the same settings.
        evaluation: the id of those settings.
    Returns:
        What went wrong with single runs, by run id: predictions that could not be written.
    """
    job = members[0].job
    scored = score_packed(pack, job, job.config.trainer.eval_batch_size, shared, display)
    errors = {}
    for member in members:
        try:
            _append(member, evaluation, scored)
        except Lost:
            raise
        except Exception as error:
            log.error("run %s: not scored\n%s", member.entry.run_id, traceback.format_exc())
            errors[member.entry.run_id] = what_failed(error)
    return errors


class Scored(NamedTuple):
    """What a pack's runs scored."""

    tables: dict[str, list[Any]]  # split -> one table per run; of a mixture, with a source column
    tokens: dict[str, str]  # split -> hash of the token ids that were scored
    generation: dict[str, Any] | None  # settings, if anything was generated
    batch_size: int
    seconds: float = 0.0


def score_packed(pack: Any, job: Job, batch_size: int, shared: Shared, display: Display) -> Scored:
    """Score every run of a pack as a job asks, in smaller batches where memory is short.

    Raises:
        MemoryError: a single example does not fit.
    """
    dataset, tokenizer = shared.dataset(job), shared.tokenizer(job)
    begun = time.perf_counter()
    while True:
        scored = _score(pack, dataset, tokenizer, job, batch_size)
        if scored is not None:
            return scored._replace(seconds=round(time.perf_counter() - begun, 3))
        if batch_size == 1:
            raise MemoryError(
                "not enough memory to score a single example; free memory and repeat the command"
            )
        batch_size = (batch_size + 1) // 2
        display.say(f"scoring does not fit into memory; trying batches of {batch_size} examples")


def _score(pack: Any, dataset: Dataset, tokenizer: Any, job: Job, batch_size: int) -> Scored | None:
    """Score every run of a pack; None if memory was short."""
    from lorabench.evaluate import GENERATED, eos_token_ids, generation_settings
    from lorabench.evaluate import scored as tables_of

    config = job.config
    pad_id = data.pad_id(tokenizer)
    found = Scored({}, {}, None, batch_size)
    try:
        for split in identity.splits_of(config):
            tokens = dataset.tokens[split]
            if config.trainer.eval_examples is not None:
                tokens = tokens.first(config.trainer.eval_examples)
            wanted = identity.metrics_of(config, split)
            asked = dataclasses.replace(config.data, metric=wanted)
            if set(GENERATED) & set(wanted):
                eos = eos_token_ids(pack.tree.generation_config, tokenizer)
                found = found._replace(generation=generation_settings(asked, eos))
            tables = tables_of(pack, tokens, tokenizer, pad_id, asked, batch_size)
            if split in dataset.sources:
                names = dataset.sources[split][: len(tokens)]
                tables = [one.append_column("source", arrays.strings(names)) for one in tables]
            found.tables[split] = tables
            found.tokens[split] = tokens.hash()
    except Exception as error:
        if not machine.is_out_of_memory(error):
            raise
    else:
        return found
    # Outside the handler: the exception held the frames, and they the tensors.
    gc.collect()
    machine.release_memory()
    return None


def _append(member: Member, evaluation: str, scored: Scored) -> None:
    """Write a run's predictions and add the evaluation to its record, which the caller writes."""
    entry = member.entry
    name = f"evaluations/{evaluation}.parquet"
    place = member.folder / name
    member.lease.check()
    part = write_predictions(place, scored, member.slot, member.lease.holder.token)
    member.lease.check()
    os.replace(part, place)
    sync(place.parent)
    entry.files |= intact.described(member.folder, [name])
    entry.evaluations = [one for one in entry.evaluations if one.id != evaluation]
    sha256 = entry.files[name].sha256
    entry.evaluations.append(evaluation_of(member.job, scored, member.slot, name, sha256))
    entry.cost.evaluate_seconds = scored.seconds
    if entry.status == "trained":
        entry.status, entry.error = "finished", None


def evaluation_of(
    job: Job, scored: Scored, slot: int, predictions: str, predictions_sha256: str
) -> record.Evaluation:
    """Return what one slot of a pack scored, as records keep it.

    Args:
        job: whose settings it was scored with.
        predictions: name of the file that `write_predictions` wrote.
    """
    from pyarrow import compute

    splits = {}
    for split, of_runs in scored.tables.items():
        wanted, table = identity.metrics_of(job.config, split), of_runs[slot]
        names = table["source"].unique().to_pylist() if "source" in table.column_names else []
        splits[split] = record.Scores(
            examples=job.plan.contents[parts.key_of(split)],
            tokens=scored.tokens[split],
            metrics=_metrics(table, wanted),
            sources={
                name: _metrics(table.filter(compute.equal(table["source"], name)), wanted)
                for name in sorted(names)
            },
        )
    device = machine.choose_device(job.config.trainer.device)
    return record.Evaluation(
        id=job.plan.evaluation_id,
        settings=job.plan.evaluation,
        splits=splits,
        predictions=predictions,
        predictions_sha256=predictions_sha256,
        batch_size=scored.batch_size,
        generation=scored.generation,
        seconds=scored.seconds,
        stack=provenance.stack(provenance.of_process(device)),
        ended=record.now(),
    )


def _metrics(table: Any, wanted: list[str]) -> dict[str, record.Metric]:
    """Return the values of a table's examples, as records keep them."""
    from lorabench.evaluate import DEFINITIONS, summarise

    return {
        name: record.Metric(
            value=value if math.isfinite(value) else None,
            num_examples=count,
            definition=DEFINITIONS[name],
        )
        for name, (value, count) in summarise(table, wanted).items()
    }


def write_predictions(place: Path, scored: Scored, slot: int, token: int) -> Path:
    """Write a slot's predictions beside their place, on the disk before they are renamed.

    Args:
        token: part of the name that tells this writer from others.
    Returns:
        The file to rename.
    """
    from pyarrow import concat_tables, parquet

    tables = [
        of_runs[slot].add_column(0, "split", arrays.strings([split] * len(of_runs[slot])))
        for split, of_runs in scored.tables.items()
    ]
    place.parent.mkdir(exist_ok=True)
    part = place.with_name(f".{place.name}.{token}.part")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    parquet.write_table(concat_tables(tables, promote_options="default"), part)
    sync(part)
    return part
