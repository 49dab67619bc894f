"""Which models compute the same where examples lie end to end: read off the model, then tried."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from lorabench.pack.attention import INNER, EndToEnd


def body_of(tree: Any) -> tuple[str, Any]:
    """Path and module of what makes the hidden states of a language model."""
    path = tree.base_model_prefix
    if path not in dict(tree.named_children()):  # Llama 4's and others' says another name
        bodies = (name for name, m in tree.named_children() if isinstance(m, PreTrainedModel))
        path = next(bodies, path)
    body = tree.get_submodule(path)
    if hasattr(body, "decoder"):  # OPT calls it past its body
        return f"{path}.decoder", body.decoder
    return path, body


def inputs(input_ids: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """What a body is called with; the mask of ones says that nothing is padding."""
    found: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        found |= {"position_ids": position_ids, "attention_mask": torch.ones_like(input_ids)}
    return found


def why_padded(tree: PreTrainedModel) -> str | None:
    """The reason a model's batches are padded, read off the model without its weights."""
    _, body = body_of(tree)
    name = tree.config._attn_implementation
    if name not in INNER:
        return f"model.attn_implementation={name} is not called on parts of a batch"
    if not getattr(tree, "_supports_attention_backend", False):
        return f"{type(tree).__name__} computes attention in a way of its own"
    if _looks_at_the_name(type(body).__module__) or getattr(
        tree.config, "reorder_and_upcast_attn", False
    ):
        return f"{type(tree).__name__} does other things by the name of its attention"
    if getattr(tree.config.get_text_config(), "attn_temperature_tuning", None):
        return f"{type(tree).__name__} scales queries by their place in the row"
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return f"{type(body).__name__} counts positions itself"
    if type(tree).__name__.endswith("ForSequenceClassification") and not any(
        getattr(module, "is_causal", False) for module in tree.modules()
    ):
        return "an encoder pools its texts inside"
    return None


@functools.cache
def _looks_at_the_name(module: str) -> bool:
    """Whether an architecture's code asks which attention it has, as sparse ones do for masks."""
    source = inspect.getsource(sys.modules[module])
    return re.search(r"_attn_implementation (not )?in ", source) is not None


_PROBED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
PROBE = (3, 11, 23)  # tokens; their sum is no other dimension of a model


def suits(base: PreTrainedModel) -> bool:
    """Whether a loaded base computes the same where examples lie end to end; tried once a base."""
    if base not in _PROBED:
        traced = isinstance(next(base.parameters()), FakeTensor)  # has shapes, and no values
        _PROBED[base] = why_padded(base) is None and (traced or _same(base))
    return _PROBED[base]


@torch.no_grad()
def _same(base: PreTrainedModel) -> bool:
    from lorabench.machine import is_out_of_memory

    _, body = body_of(base)
    device = str(base.device)
    vocabulary = base.config.get_text_config().vocab_size
    ids = [(7 * torch.arange(n, device=device) + 5 * n) % vocabulary for n in PROBE]
    others = [ids[0], (ids[1] + 3) % vocabulary, ids[2]]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    there = torch.arange(max(PROBE)) < torch.tensor(PROBE)[:, None]
    positions = torch.cat([torch.arange(n, device=device) for n in PROBE])[None]

    def end_to_end(examples: list[Tensor]) -> Tensor:
        with EndToEnd([[(1, list(PROBE))]], device).on(base):
            return body(**inputs(torch.cat(examples)[None], positions)).last_hidden_state[0]

    try:
        expected = body(**inputs(padded, None)).last_hidden_state[there.to(device)]
        found, changed = end_to_end(ids), end_to_end(others)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False  # whatever a model says of such a batch, it does not suit
    if found.shape != expected.shape:
        return False
    # Rounding differs by a few of the last bits; wrong positions differ in the first.
    bound = torch.finfo(found.dtype).eps ** 0.5
    gap = (found - expected).double().norm(dim=-1)
    if not bool((gap <= bound * expected.double().norm(dim=-1)).all()):
        return False
    # What is in one example reaches no other: not by a bit, or where experts get other numbers of
    # tokens by rounding alone.
    first, second, _ = PROBE
    apart = [slice(first), slice(first + second, None)]
    exact = all(torch.equal(found[part], changed[part]) for part in apart)
    if exact or found.dtype not in (torch.float32, torch.float64):
        return exact
    bound = 100 * torch.finfo(found.dtype).eps
    return all(
        float((found[part] - changed[part]).norm()) <= bound * float(found[part].norm())
        for part in apart
    )
