"""Lints of scales and ranks: how much an update counts, and how much a module can hold."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from lorabench.compare.lints.design import Design, Lint, number

NARROW = re.compile(r"lora\.r: (\d+) is more than the smaller side of (.+?\)): ")


class Scale(NamedTuple):
    """What multiplies a setting's updates: alpha / r, or alpha / sqrt(r) for rsLoRA."""

    r: float
    alpha: float
    rslora: bool

    @property
    def value(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def scale_of(values: dict[str, Any]) -> Scale:
    """Return the scale of a setting, patterns aside.

    Args:
        values: of the config, by dotted key.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732.
    """
    r, alpha = float(values.get("lora.r") or 16), values.get("lora.lora_alpha")
    if alpha is None:
        ratio = values.get("lora.alpha_ratio")
        alpha = (2.0 if ratio is None else ratio) * r
    return Scale(r, float(alpha), bool(values.get("lora.use_rslora")))


def scale_with_rank(design: Design) -> list[Lint]:
    """Find ranks compared at other scales: the size of an update changes together with r.

    Plain LoRA divides alpha by r, so alpha must grow with r; rsLoRA divides by sqrt(r) and is
    meant for one alpha at every rank (arXiv:2312.03732).
    """
    if design.is_chosen("lora.lora_alpha") or design.is_chosen("lora.alpha_ratio"):
        return []
    groups: dict[tuple[str, float], list[int]] = {}
    for i, values in enumerate(design.settings):
        scale = scale_of(values)
        if scale.rslora:
            groups.setdefault(("ratio", round(scale.alpha / scale.r, 9)), []).append(i)
        elif values.get("lora.lora_alpha") is not None:
            groups.setdefault(("alpha", scale.alpha), []).append(i)
    found = []
    for (what, value), settings in groups.items():
        of = [scale_of(design.settings[i]) for i in settings]
        scales = {one.r: one.value for one in of}
        if len(scales) < 2:
            continue
        ranks = ", ".join(number(r) for r in sorted(scales))
        lowest, highest = min(scales), max(scales)
        steps = f"{number(scales[lowest])} to {number(scales[highest])}"
        if what == "alpha":
            text = (
                f"lora_alpha is {number(value)} at every rank (r={ranks}), so the scale alpha / r "
                f"falls from {steps}: settings that differ in r also differ in how much an "
                f"update counts"
            )
            remedy = (
                f"set lora.alpha_ratio={value / lowest:g} in place of "
                f"lora.lora_alpha={value:g}: the scale is then the same at every rank"
            )
        else:
            text = (
                f"lora_alpha is {number(value)} r under rsLoRA (r={ranks}), so the scale "
                f"alpha / sqrt(r) grows from {steps}: settings that differ in r also differ in "
                f"how much an update counts"
            )
            remedy = (
                f"set lora.lora_alpha={value * lowest:g} in place of lora.alpha_ratio: "
                f"rsLoRA is meant for one alpha at every rank"
            )
        found.append(Lint("scale-with-rank", text, remedy, design.ids(settings)))
    return found


def rslora_beside_plain(design: Design) -> list[Lint]:
    """Find rsLoRA compared with plain scaling at another scale, at one learning rate for both."""
    if design.is_chosen("trainer.lr"):
        return []
    scales: dict[float, dict[bool, set[float]]] = {}
    for values in design.settings:
        scale = scale_of(values)
        scales.setdefault(scale.r, {}).setdefault(scale.rslora, set()).add(scale.value)
    ranks = [r for r, of in scales.items() if len(of) == 2 and of[True] != of[False] and r > 1]
    if not ranks:
        return []
    r = max(ranks)
    plain, other = (", ".join(map(number, sorted(scales[r][which]))) for which in (False, True))
    alphas = [f"{scale * math.sqrt(r):g}" for scale in sorted(scales[r][False])]
    settings = [i for i, one in enumerate(design.settings) if scale_of(one).r in ranks]
    text = (
        f"rsLoRA (scale alpha / sqrt(r)) is compared with plain LoRA (scale alpha / r) at other "
        f"scales, such as {other} and {plain} at r={number(r)}: a difference may be the scale's"
    )
    remedy = (
        f"sweep trainer.lr too and compare with `--select trainer.lr`, or give rsLoRA the same "
        f"scale: lora.lora_alpha={' or '.join(alphas)} at r={number(r)}"
    )
    return [Lint("rslora-beside-plain", text, remedy, design.ids(settings))]


def rank_above_module(design: Design) -> list[Lint]:
    """Find ranks above a module's smaller side, from the plans' warnings in the notes."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in design.records:
        for note in one.notes:
            if match := NARROW.match(note):
                found.setdefault((match[1], match[2]), []).append(one.run_id)
    lints = []
    for (r, modules), ids in sorted(found.items(), key=lambda item: int(item[0][0])):
        side = re.search(r": (\d+)\)$", modules)
        limit = f"compare ranks up to {side[1]}" if side else "compare smaller ranks"
        lints.append(
            Lint(
                "rank-above-module",
                f"r={r} is more than the smaller side of {modules}: ranks above that add "
                f"parameters without adding capacity",
                f"{limit}, or give these modules less with lora.rank_pattern",
                tuple(ids),
            )
        )
    return lints
