"""Runs trained together over one base forward.

solo      the pack of one on PEFT's own modules
stacked   several runs, their adapters stacked
places    what PEFT trains of one run, and why some runs train alone
storage   the dense blocks those tensors lie in
layers    the layers that serve all runs at once
norms     frozen norms with a backward written by hand
optimizer AdamW over stacked storage
head      hidden states -> nll, on chosen rows, in chunks
batch     one micro-batch, and which rows of it carry a loss
"""

from lorabench.pack.batch import Batch, target_rows
from lorabench.pack.places import why_alone
from lorabench.pack.solo import ModulePack
from lorabench.pack.stacked import StackedPack

__all__ = ["Batch", "ModulePack", "StackedPack", "target_rows", "why_alone"]
