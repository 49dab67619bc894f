"""The base model: where it is, which bytes it is, its skeleton, its weights, its tokenizer.

Knows nothing of adapters. Torch and transformers are imported only where weights or shapes are
needed, so that run ids and checks of a sweep cost no import.
"""

from lorabench.model.dtypes import dtype_notes, resolved, settled
from lorabench.model.fits import check_tokens
from lorabench.model.hub import hub_commit, must_be_reachable, unpinned
from lorabench.model.kernels import errors as attention_errors
from lorabench.model.loading import (
    NO_CODE,
    architecture,
    dtype,
    load,
    plain,
    random_settings,
    skeleton,
    stops,
    tokenizer,
)
from lorabench.model.place import (
    TOKENIZER_FILES,
    WEIGHT_PATTERNS,
    ZOO,
    check,
    findable,
    identity,
    local_folder,
    location,
)
from lorabench.model.positions import fitting
from lorabench.model.tensors import checksum, is_tied, num_parameters, output_head, share
from lorabench.model.verified import load_verified, tokenizer_verified

__all__ = [
    "NO_CODE",
    "TOKENIZER_FILES",
    "WEIGHT_PATTERNS",
    "ZOO",
    "architecture",
    "attention_errors",
    "check",
    "check_tokens",
    "checksum",
    "dtype",
    "dtype_notes",
    "findable",
    "fitting",
    "hub_commit",
    "identity",
    "is_tied",
    "load",
    "load_verified",
    "local_folder",
    "location",
    "must_be_reachable",
    "num_parameters",
    "output_head",
    "plain",
    "random_settings",
    "resolved",
    "settled",
    "share",
    "skeleton",
    "stops",
    "tokenizer",
    "tokenizer_verified",
    "unpinned",
]
