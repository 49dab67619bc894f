"""Runs trained together over one base forward.

solo      the pack of one on PEFT's own modules
stacked   several runs, their adapters stacked
places    what PEFT trains of one run, and why some runs train alone
storage   the dense blocks those tensors lie in
allocation which tensors lie in which block
rows      whose row is whose, and which of them anybody reads
attention what a model calls where examples lie end to end
softcap   soft-capped attention without T x T scores
ways      how attention goes through them: one by one, or in buckets of similar lengths
compiling a model's body as one graph
probe     which models compute the same so
repeat    where a batch that runs share is computed once for all
layers    the layers that serve all runs at once
norms     frozen norms with a backward written by hand
rotary    rotary embeddings, likewise
optimizer AdamW over stacked storage
head      hidden states -> nll, on chosen rows, in chunks
trace     a step on tensors without storage
account   what it takes: bytes, FLOPs and calls
batch     one micro-batch, and how it is laid out
"""

from lorabench.pack.batch import Batch, Laid
from lorabench.pack.places import why_alone
from lorabench.pack.solo import ModulePack
from lorabench.pack.stacked import StackedPack

__all__ = ["Batch", "Laid", "ModulePack", "StackedPack", "why_alone"]
