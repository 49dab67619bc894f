"""The base model: where it is, which bytes it is, its skeleton, its weights, its tokenizer.

Knows nothing of adapters. Torch and transformers are imported only where weights or shapes are
needed, so that run ids and checks of a sweep cost no import.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import tasks, versions
from lorabench.config import ConfigErrors, ModelConfig, model_name, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

ZOO = Path(__file__).parent / "zoo"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def location(model: ModelConfig) -> str:
    """A path or hub id that transformers loads: embedded bases lie in the package."""
    if model.path.startswith("lorabench:"):
        name = model.path.removeprefix("lorabench:")
        folder = ZOO / name
        if not (folder / "config.json").is_file():
            embedded = sorted(p.parent.name for p in ZOO.glob("*/config.json"))
            raise ConfigErrors(
                f"model.path: 'lorabench:NAME' must name an embedded base "
                f"({', '.join(embedded)}); got '{name}'"
            )
        return str(folder)
    return model.path


def local_folder(model: ModelConfig) -> Path | None:
    """The checkpoint folder, or None where `path` is a hub id."""
    where = location(model)
    if Path(where).is_dir():
        return Path(where).resolve()
    if where.startswith((".", "/", "~", os.sep)) or not re.fullmatch(
        r"[\w.\-]+(/[\w.\-]+)?", where
    ):
        folder = Path(where).parent
        near = (
            nearest(Path(where).name, [p.name for p in folder.iterdir()]) if folder.is_dir() else []
        )
        raise ConfigErrors(
            f"model.path: must be a folder with a transformers checkpoint, or a hub id; no folder "
            f"'{where}'" + (f" (did you mean '{folder / near[0]}'?)" if near else "")
        )
    return None


def check(model: ModelConfig) -> list[str]:
    """What is wrong with where the base is said to be; needs neither network nor torch."""
    try:
        folder = local_folder(model)
    except ConfigErrors as error:
        return error.errors
    if folder is None:
        return []
    errors = []
    if not (folder / "config.json").is_file():
        errors.append(
            f"model.path: a checkpoint folder must hold config.json; '{model.path}' has none; "
            f"save the model there with save_pretrained"
        )
    elif not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        errors.append(
            f"model.path: a checkpoint folder must hold weights ({', '.join(WEIGHT_PATTERNS)}); "
            f"'{model.path}' has none"
        )
    return errors


def identity(model: ModelConfig) -> dict[str, str]:
    """Which base this is, whatever its place: content hashes of a folder, or the hub commit."""
    folder = local_folder(model)
    if folder is None:
        commit = hub_commit(model)
        return {"hub": model.path, "revision": commit, "weights": "", "tokenizer": ""}
    weights = [folder / "config.json"]
    for pattern in WEIGHT_PATTERNS:
        weights += sorted(folder.glob(pattern))
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {
        "hub": "",
        "revision": "",
        "weights": _files_hash(weights),
        "tokenizer": _files_hash(tokenizer),
    }


@lru_cache
def _hub_commit(path: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    wanted = revision or "main"
    cached = try_to_load_from_cache(path, "config.json", revision=wanted)
    if isinstance(cached, str):
        return Path(cached).parent.name
    try:
        return str(HfApi().model_info(path, revision=wanted).sha)
    except Exception as error:
        raise ConfigErrors(hub_failure("model.path", path, error)) from error


def hub_commit(model: ModelConfig) -> str:
    """The commit a hub model is pinned to; a pinned one needs no network."""
    if model.revision and re.fullmatch(r"[0-9a-f]{40}", model.revision):
        return model.revision
    return _hub_commit(model.path, model.revision)


def hub_failure(key: str, path: str, error: BaseException) -> str:
    """One line for a hub that does not answer, refuses, or does not know the name."""
    text = f"{type(error).__name__}: {error}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or re.search(r"\b(401|403)\b|[Gg]ated", text):
        return (
            f"{key}: '{path}' is gated or private and this machine may not read it; accept the "
            f"licence at https://huggingface.co/{path} and set HF_TOKEN, or give a local folder "
            f"with {key}=/path/to/checkpoint"
        )
    if (
        status == 404
        or "RepositoryNotFound" in text
        or "not a valid model id" in text
        or "RevisionNotFound" in text
    ):
        return (
            f"{key}: the hub knows no '{path}' at that revision; check the name, or give a local "
            f"folder with {key}=/path/to/checkpoint"
        )
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"{key}: '{path}' is no local folder and cannot be had from the hub ({first}); give "
        f"a local folder with {key}=/path/to/checkpoint, or run once with a network"
    )


@lru_cache(maxsize=64)
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _files_hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.name} {_cached_hash(path, stat)}\n".encode())
    return digest.hexdigest()


def _cached_hash(path: Path, stat: os.stat_result) -> str:
    """A file's sha256, remembered between processes while its size and time stay the same."""
    if stat.st_size < 1 << 26:
        return _file_hash(str(path), stat.st_size, stat.st_mtime_ns)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lorabench" / "hashes"
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    known = cache / key
    if known.is_file():
        return known.read_text()
    value = _file_hash(str(path), stat.st_size, stat.st_mtime_ns)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        known.write_text(value)
    except OSError:
        pass  # a read-only home only costs hashing again
    return value


def dtype(name: str) -> torch.dtype:
    """torch's dtype of that name."""
    import torch

    return getattr(torch, name)


def _call(model: ModelConfig, load: Callable[..., Any], **options: Any) -> Any:
    """A transformers loader on this base, its failures as one line."""
    folder = local_folder(model)
    if folder is None:
        options["revision"] = model.revision or "main"
        _must_be_reachable(model)
    try:
        return load(location(model), **options)
    except (OSError, ConnectionError) as error:
        if folder is None:
            raise ConfigErrors(hub_failure("model.path", model.path, error)) from error
        raise ConfigErrors(
            f"model.path: '{model.path}' does not load: {str(error).splitlines()[0]}"
        ) from error
    except ConfigErrors:
        raise
    except ValueError as error:  # a file this transformers does not know
        first = str(error).strip().splitlines()[0]
        raise ConfigErrors(f"model.path: '{model.path}' does not load: {first}") from error


def _must_be_reachable(model: ModelConfig) -> None:
    """Refuse at once where the hub's name does not resolve: its client would retry for long."""
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants, try_to_load_from_cache

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision or "main")
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if isinstance(cached, str) or proxied or constants.HF_HUB_OFFLINE:
        return
    host = urlparse(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise ConfigErrors(
            hub_failure("model.path", model.path, OSError(f"no network: {host} does not resolve"))
        ) from error


def architecture(model: ModelConfig, classes: int = 0) -> Any:
    """The transformers config, base dropouts at zero.

    Only lora_dropout is an experiment's business: masks inside the base would tie a run's
    randomness to what else is computed.

    Args:
        classes: of a classification; 0: a language model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    def load(where: str, **options: Any) -> Any:
        content, _ = PreTrainedConfig.get_config_dict(where, **options)
        if unknown := versions.unknown_architecture(content, CONFIG_MAPPING):
            raise ConfigErrors(f"model.path: '{model.path}' cannot be built: {unknown}")
        return AutoConfig.from_pretrained(where, **options)

    config = _call(model, load)
    for part in {
        id(config): config,
        id(config.get_text_config()): config.get_text_config(),
    }.values():
        for key, value in list(vars(part).items()):
            if isinstance(value, float) and re.search(r"dropout|pdrop", key) and value:
                setattr(part, key, 0.0)
    if classes:
        config.num_labels = classes
    return config


def skeleton(model: ModelConfig, classes: int = 0) -> PreTrainedModel:
    """The model on the meta device: every name and shape, no weights."""
    import torch

    config = architecture(model, classes)
    loader = tasks.model_class(config, classes, model_name(model))
    try:
        # Quiet: transformers advises on an encoder that `tasks.check` refuses below.
        with torch.device("meta"), _quiet_loading(True):
            built = loader.from_config(
                config, attn_implementation=model.attn_implementation, dtype=dtype(model.dtype)
            )
    except (ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigErrors(f"model.path: '{model.path}' cannot be built: {first}") from error
    tasks.check(built, classes, model_name(model))
    return built


def load(model: ModelConfig, device: str, classes: int = 0) -> PreTrainedModel:
    """The frozen base on its device, in evaluation mode, no parameter trainable.

    Args:
        classes: of a classification, whose head is zero here; 0: a language model.
    """
    config = architecture(model, classes)
    # A checkpoint that is a classifier itself may have another number of classes.
    options = {"ignore_mismatched_sizes": True} if classes else {}
    with _quiet_loading(bool(classes)):
        base, loaded = _call(
            model,
            tasks.model_class(config, classes, model_name(model)).from_pretrained,
            config=config,
            attn_implementation=model.attn_implementation,
            dtype=dtype(model.dtype),
            output_loading_info=True,
            **options,
        )
    if classes:
        tasks.blank_head(base, loaded, model_name(model))
    else:
        _must_be_whole(base, sorted(loaded["missing_keys"]), model)
    base.requires_grad_(False)
    base.config.use_cache = False
    return base.to(device).eval()


def plain(model: ModelConfig, auto: Any, dtype_name: str, **options: Any) -> Any:
    """The base as `auto`, an Auto class, loads it: its own config, nothing switched off, CPU."""
    if "num_labels" in options:  # of a checkpoint that is a classifier itself
        options["ignore_mismatched_sizes"] = True
    with _quiet_loading("num_labels" in options):
        return _call(model, auto.from_pretrained, dtype=dtype(dtype_name), **options).eval()


@contextmanager
def _quiet_loading(quiet: bool) -> Iterator[None]:
    """Keep transformers' report of a head that is new, as it must be, off the screen."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    if quiet:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _must_be_whole(base: PreTrainedModel, missing: list[str], model: ModelConfig) -> None:
    """Refuse a checkpoint without some weights: transformers draws them at random, and goes on."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigErrors(
            f"model.path: a checkpoint must hold every weight of {type(base).__name__}; "
            f"'{model.path}' lacks {missing[0]}{more}, which would be random; save the whole model "
            f"with save_pretrained, or correct tie_word_embeddings in its config.json"
        )


def tokenizer(model: ModelConfig) -> Any:
    """The base's own tokenizer."""
    from transformers import AutoTokenizer

    return _call(model, AutoTokenizer.from_pretrained)


def share(
    base: PreTrainedModel, owned: Callable[[str], bool] = lambda name: False
) -> PreTrainedModel:
    """A second module tree over the same tensors: injecting into it leaves the base as it was.

    Args:
        owned: parameter names that get a copy of their own, because a run trains them.
    """
    memo: dict[int, Any] = {id(t): t for t in base.buffers()}
    memo |= {id(p): p for name, p in base.named_parameters() if not owned(name)}
    return copy.deepcopy(base, memo)


def output_head(base: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """Name and module of the output layer; None where the model has none."""
    if tasks.is_classifier(base):
        return tasks.classifier(base)
    head = base.get_output_embeddings()
    if head is None:
        return None
    return next(name for name, module in base.named_modules() if module is head), head


def is_tied(base: PreTrainedModel) -> bool:
    """Whether the head's weight is the input embedding's."""
    head = output_head(base)
    return head is not None and head[1].weight is base.get_input_embeddings().weight


def num_parameters(base: PreTrainedModel) -> int:
    """Parameters, tied ones counted once."""
    return sum(p.numel() for p in base.parameters())


def checksum(base: PreTrainedModel) -> str:
    """A hash over names, shapes and bits of every parameter and persistent buffer.

    Two position-weighted integer sums a tensor, taken on its own device: a single changed bit
    changes it, and a model of billions of weights costs a second.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in base.state_dict(keep_vars=True).items():
        bits = tensor.detach().contiguous().view(-1)
        bits = bits.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]
        )
        plain = weighted = 0
        for start in range(0, bits.numel(), 1 << 24):
            block = bits[start : start + (1 << 24)].to(torch.int64)
            position = torch.arange(start, start + block.numel(), device=block.device)
            plain += int(block.sum())
            weighted += int((block * (position * 2654435761 + 40503)).sum())  # wraps, by design
        entry = [name, list(tensor.shape), str(tensor.dtype), plain, weighted]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()
