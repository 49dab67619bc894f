"""Plain PEFT folders, and hashes of what is in them."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict

from lorabench import model as base_model
from lorabench.adapters.inject import ADAPTER, trainable
from lorabench.files import share

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def state_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_state(wrapped: PeftModel) -> dict[str, Tensor]:
    """What a saved adapter holds, under PEFT's names; never a weight of the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(
            wrapped, adapter_name=ADAPTER, save_embedding_layers=False
        )
    # PEFT before 0.21 trains the biases of bias=lora_only and leaves them out.
    biases = {n: p for n, p in trainable(wrapped).items() if n.endswith(".base_layer.bias")}
    state |= {name: bias.detach() for name, bias in biases.items() if name not in state}
    # With bias=all PEFT lists the bias of a trained head three times.
    again = (".modules_to_save.", ".original_module.")
    return {name: tensor for name, tensor in state.items() if not any(a in name for a in again)}


def reload(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on a base by plain PEFT; the base is left as it was."""
    # An adapter with trained biases writes them into the modules it is loaded on.
    tree = base_model.share(base, owned=lambda name: name.endswith("bias"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied-layer warnings: the plan says it in full
        return PeftModel.from_pretrained(tree, str(folder), adapter_name=ADAPTER).eval()


def read_settings(folder: Path) -> LoraConfig:
    """Return the config that a plain PEFT folder holds.

    Raises:
        ValueError: it is no LoRA adapter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # keys of other versions of PEFT
        found = PeftConfig.from_pretrained(str(folder))
    if not isinstance(found, LoraConfig):
        raise ValueError(f"it is an adapter of {found.peft_type}, not LORA")
    return found


def save(tensors: Mapping[str, Tensor], settings: LoraConfig, folder: Path) -> str:
    """Write an adapter in plain PEFT format and return the hash of its tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = copy.copy(settings)
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    # PEFT holds names in sets, whose order changes from process to process.
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    for name in ("target_modules", "modules_to_save"):
        if isinstance(content.get(name), list):
            content[name] = sorted(content[name])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    share(folder)
    return state_hash(state)
