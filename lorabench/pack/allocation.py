"""Which tensors of a pack lie in which store: of each kind, those that the same runs train."""

from __future__ import annotations

from typing import Any

import torch

from lorabench import adapters
from lorabench.config import Config
from lorabench.pack.places import Place
from lorabench.pack.storage import Members, Stacked, Store

Key = tuple[str, str]  # kind of a place, and its module


def stored_shape(place: Place) -> tuple[int, ...]:
    """B is stored as (K, O): each run's part of a padded stack is then one contiguous block."""
    return place.shape[::-1] if place.kind == "lora_B" else place.shape


def allocate(
    places: list[list[Place]], layers: list[dict[str, Any]], config: Config, device: str
) -> tuple[dict[Key, Stacked], list[Store]]:
    """One stacked tensor a (kind, module), for the runs that train it, zeros.

    Args:
        places: of each run, what PEFT trains.
        layers: of each run, PEFT's LoRA layers by module.
        config: of any run; they share precisions.
    """
    holders: dict[Key, list[int]] = {}
    shapes: dict[Key, tuple[int, ...]] = {}
    how: dict[Key, tuple[bool, bool]] = {}  # whether it decays, whether it is in LoRA+'s group B
    for run, found in enumerate(places):
        for place in found:
            key, shape = (place.kind, place.module), stored_shape(place)
            holders.setdefault(key, []).append(run)
            shapes[key] = tuple(map(max, shapes.get(key, shape), shape))  # padded to the largest
            how[key] = place.decays, place.group_b
    dtype = torch.float64 if config.trainer.dtype == "float64" else torch.float32
    low = torch.bfloat16 if config.trainer.dtype == "bfloat16" else None
    members = {tuple(runs): Members(runs, len(places), device) for runs in holders.values()}
    stores: dict[Any, Store] = {}
    stacked: dict[Key, Stacked] = {}
    for key, runs in holders.items():
        kind, module = key
        # A full copy of a head lies by itself: its gradient is taken as it was made.
        which = kind, tuple(runs), how[key], module if kind == "copy" else ""
        if which not in stores:
            used = low if kind in ("lora_A", "lora_B", "copy") else None
            stores[which] = Store(members[tuple(runs)], dtype, used, device, *how[key])
        scales = None
        if kind == "lora_B":
            scales = [float(layers[run][module].scaling[adapters.ADAPTER]) for run in runs]
        stacked[key] = stores[which].add(shapes[key], scales)
    for store in stores.values():
        store.allocate()
    return stacked, list(stores.values())
