"""LoRA modules on a base: which ones, their seeded weights, their files.

PEFT decides which modules are wrapped, their shapes and scales; this room resolves names before
PEFT sees them, seeds every module by its name, and reads and writes plain PEFT folders.
"""

from lorabench.adapters.anatomy import experts, state_space
from lorabench.adapters.dropout import Clock, KeyedDropout, key_dropout
from lorabench.adapters.files import adapter_state, read_settings, reload, save, state_hash
from lorabench.adapters.inject import (
    ADAPTER,
    CHANGES_BASE,
    as_plain_lora,
    attach,
    attach_skeleton,
    check_bias,
    check_init,
    check_saved,
    decayed,
    initial_head,
    lora_layers,
    owner,
    peft_config,
    raise_precision,
    seed_weights,
    trainable,
    wrap_skeleton,
)
from lorabench.adapters.loraplus import embedding_notes, is_group_b, lr_factors
from lorabench.adapters.seeding import initial_a, initial_ab, key
from lorabench.adapters.targets import notes, resolve_modules

__all__ = [
    "ADAPTER",
    "CHANGES_BASE",
    "Clock",
    "KeyedDropout",
    "adapter_state",
    "as_plain_lora",
    "attach",
    "attach_skeleton",
    "check_bias",
    "check_init",
    "check_saved",
    "decayed",
    "embedding_notes",
    "experts",
    "initial_a",
    "initial_ab",
    "initial_head",
    "is_group_b",
    "key",
    "key_dropout",
    "lora_layers",
    "lr_factors",
    "notes",
    "owner",
    "peft_config",
    "raise_precision",
    "read_settings",
    "reload",
    "resolve_modules",
    "save",
    "seed_weights",
    "state_hash",
    "state_space",
    "trainable",
    "wrap_skeleton",
]
