"""A pack tried before its day of GPU: a few steps on two examples, then back by plain PEFT.

Uses the runs' own model, tokenizer, data and settings, and leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from lorabench import adapters, data, machine
from lorabench import model as base_model
from lorabench.config import ConfigErrors, first_line
from lorabench.pack import Batch
from lorabench.pack.solo import autocast
from lorabench.sweep import Job
from lorabench.train import train
from lorabench.worker import Shared, begin_from, make_pack

log = logging.getLogger(__name__)

STEPS = 2  # of each stage: B moves in the first, A in the second
EXAMPLES = 2
ROWS = 8  # of each example's completion whose logits are compared: a vocabulary is large
# Largest relative difference of logits: roundings (6e-8; 4e-3 in bfloat16) of products of other
# shapes, layer upon layer. Some architectures compute parts of a float64 forward in float32.
BOUNDS = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 5e-2}


@dataclass
class Attempt:
    """How a pack fared."""

    runs: list[str]  # run ids
    steps: int
    error: str | None  # None: all went well
    logits_difference: float | None  # largest of the reloaded adapters, relative
    seconds: float

    def __str__(self) -> str:
        size = f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''}"
        if self.error is not None:
            return f"{size}: failed: {self.error}"
        through = " through every stage" if self.steps > STEPS else ""
        return (
            f"{size}: {self.steps} steps{through} on {EXAMPLES} examples, adapters reloaded by "
            f"plain PEFT, logits within {self.logits_difference:.1e}, {self.seconds:.0f} s"
        )


def attempt(jobs: list[Job], shared: Shared) -> Attempt:
    """Try the runs of a pack; whatever goes wrong is told, never raised."""
    begun, error, difference = time.perf_counter(), None, None
    starts = {stage["from_step"] for job in jobs for stage in job.config.stages}
    shortened = [_shortened(job, sorted(starts | {0})) for job in jobs]
    try:
        difference = _there_and_back(shortened, shared)
    except ConfigErrors as refused:
        error = "; ".join(refused.errors)
    except Exception as failure:
        log.info("smoke failed", exc_info=True)
        error = f"{type(failure).__name__}: {first_line(failure, None)}"
    ids, steps = [job.plan.run_id for job in jobs], shortened[0].config.trainer.num_steps
    return Attempt(ids, steps, error, difference, time.perf_counter() - begun)


def _shortened(job: Job, starts: list[int]) -> Job:
    """The same run at its full learning rate, every stage a few steps long.

    Args:
        starts: steps at which a stage of any run of its pack begins.
    """
    begins = {start: STEPS * i for i, start in enumerate(starts)}
    trainer = dataclasses.replace(
        job.config.trainer,
        steps=STEPS * len(starts),
        batch_size=EXAMPLES,
        micro_batch_size=None,
        warmup_steps=0,
    )
    stages = [
        stage | {"from_step": begins[stage["from_step"]], "rewarm_steps": 0}
        for stage in job.config.stages
    ]
    config = dataclasses.replace(job.config, trainer=trainer, stages=stages)
    return dataclasses.replace(job, config=config)


def _there_and_back(jobs: list[Job], shared: Shared) -> float:
    """Train, save, reload; the largest relative difference of logits."""
    config = jobs[0].config  # what runs of a pack share: base, data, precision
    machine.configure_torch(config)
    device = machine.choose_device(config.trainer.device)
    labels = jobs[0].plan.labels
    tokens = shared.dataset(jobs[0]).tokens["train"].first(EXAMPLES)
    pad_id = data.pad_id(shared.tokenizer(jobs[0]))

    pack, base, checksum = make_pack(shared, jobs, device)
    begin_from(pack, jobs)
    initial = [adapters.state_hash(pack.adapter_state(run)) for run in range(pack.size)]
    for step in train(pack, tokens, pad_id):
        for run in step.ended:
            raise RuntimeError(
                f"{jobs[run].label}: loss or gradient is not finite at step {step.step}"
            )
    padded = data.batch(tokens, range(len(tokens)), None, pad_id)
    if not labels:
        _first_rows(padded[1])
    logits_RNV = pack.logits(
        Batch.make([padded[0]], [padded[1]], [pack.size], classes=bool(labels))
    )

    differences = []
    with tempfile.TemporaryDirectory(prefix="lorabench-smoke-") as place:
        for run, job in enumerate(jobs):
            tensors, folder = pack.adapter_state(run), Path(place) / job.plan.run_id
            if adapters.state_hash(tensors) == initial[run]:
                raise RuntimeError(f"{job.label}: no weight of the adapter moved")
            adapters.save(tensors, pack.settings(run), folder)
            wrapped = adapters.reload(base, folder)
            _must_be_equal(job.label, adapters.adapter_state(wrapped), tensors)
            difference = _difference(wrapped, padded, logits_RNV[run], job, pad_id)
            if not difference <= BOUNDS[config.trainer.dtype]:
                raise RuntimeError(
                    f"{job.label}: logits of the reloaded adapter are off by {difference:.1e}, "
                    f"more than rounding"
                )
            differences.append(difference)
    if base_model.checksum(base) != checksum:
        shared.drop_base()
        raise RuntimeError("the frozen base changed")
    return max(differences)


def _must_be_equal(label: str, read: dict[str, Tensor], written: dict[str, Tensor]) -> None:
    if set(read) != set(written):
        differing = sorted(set(read) ^ set(written))
        raise RuntimeError(f"{label}: PEFT does not read what was saved, such as {differing[0]}")
    for name, tensor in written.items():
        if not torch.equal(read[name].cpu(), tensor.detach().cpu().to(read[name].dtype)):
            raise RuntimeError(f"{label}: {name} comes back with other values")


def _first_rows(labels_BT: np.ndarray) -> None:
    """Leave each example its first labels."""
    labels_BT[(labels_BT != data.IGNORED).cumsum(1) > ROWS] = data.IGNORED


@torch.no_grad()
def _difference(
    wrapped: PeftModel,
    padded: tuple[np.ndarray, np.ndarray],
    logits_NV: Tensor,
    job: Job,
    pad_id: int,
) -> float:
    """|logits - PEFT's| / |PEFT's| over the rows that carry a loss."""
    device = str(logits_NV.device)
    ids_BT, labels_BT = (torch.from_numpy(one).to(device) for one in padded)
    inputs = {"input_ids": ids_BT}
    if job.plan.labels:  # a classification: one row an example, whose label is at its last token
        last_B1 = (labels_BT != data.IGNORED).int().argmax(1)[:, None]
        inputs["attention_mask"] = (torch.arange(ids_BT.shape[1], device=device) <= last_B1).long()
        inner: Any = wrapped.get_base_model()
        inner.config.get_text_config().pad_token_id = pad_id
        with autocast(job.config, device):
            theirs = wrapped(**inputs).logits.double()
        return float((logits_NV.double() - theirs).norm() / theirs.norm())
    with autocast(job.config, device):
        theirs_BTV = wrapped(**inputs, use_cache=False).logits
    # Position t predicts the token at t + 1.
    theirs = theirs_BTV[:, :-1][labels_BT[:, 1:] != data.IGNORED].double()
    return float((logits_NV.double() - theirs).norm() / theirs.norm())
