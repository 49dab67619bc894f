"""Runs trained together over one base forward.

solo      the pack of one on PEFT's own modules
stacked   several runs, their adapters stacked
layers    the layers that serve all runs at once
optimizer AdamW over stacked storage
head      hidden states -> nll, on chosen rows, in chunks
batch     one micro-batch, and which rows of it carry a loss
"""

from lorabench.pack.batch import Batch, target_rows
from lorabench.pack.solo import ModulePack
from lorabench.pack.stacked import StackedPack, why_alone

__all__ = ["Batch", "ModulePack", "StackedPack", "target_rows", "why_alone"]
