"""A base as transformers builds it: config, skeleton, weights, tokenizer; failures as one line.

Torch and transformers are imported where they are called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench import tasks, versions
from lorabench.config import ConfigErrors, ModelConfig, and_more, first_line, model_name
from lorabench.hub import hub_failure
from lorabench.model import fits, foreign, kernels
from lorabench.model.dtypes import resolved
from lorabench.model.hub import must_be_reachable, pickled_on_hub
from lorabench.model.place import adapter_beside, beside, local_folder, location

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# Of every loader of weights: transformers would ask on the terminal, and unpickle.
NO_CODE = {"trust_remote_code": False, "use_safetensors": True}


def dtype(name: str) -> torch.dtype:
    """torch's dtype of that name."""
    import torch

    return getattr(torch, name)


# Rates of what a base draws at random while it trains: dropout, attn_pdrop, layerdrop,
# drop_path_rate, drop_connect_rate, router_jitter_noise, moe_jitter_eps and the like.
RANDOM = re.compile(r"drop|jitter")


def random_settings(config: Any) -> dict[str, float]:
    """Return the rates, other than zero, at which a base would act at random in training.

    Those of a part are named with it: `ffn_config.moe_jitter_eps`.

    Args:
        config: a transformers config.
    """
    return {name: getattr(part, key) for part, key, name in _random_settings(config)}


def _random_settings(config: Any, prefix: str = "") -> Iterator[tuple[Any, str, str]]:
    """Yield every such rate: the config that holds it, its key there, its dotted name."""
    from transformers import PreTrainedConfig

    for key, value in list(vars(config).items()):
        if isinstance(value, float) and value and RANDOM.search(key):
            yield config, key, f"{prefix}{key}"
        elif isinstance(value, PreTrainedConfig):
            yield from _random_settings(value, f"{prefix}{key}.")


def architecture(model: ModelConfig, classes: int = 0) -> Any:
    """Return the transformers config with everything random in the base at zero.

    Only lora_dropout is an experiment's business: randomness inside the base would tie a run's
    result to the global seed and to what else is computed.

    Args:
        classes: of a classification; 0: a language model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    def load(where: str, **options: Any) -> Any:
        content, _ = PreTrainedConfig.get_config_dict(where, **options)
        if unknown := versions.unknown_architecture(content, CONFIG_MAPPING):
            raise ConfigErrors(f"model.path: '{model.path}' cannot be built: {unknown}")
        wrong = foreign.kernels(model, content) + fits.quantised(model, content)
        wrong += foreign.code_of_tokenizer(model, get_tokenizer_config(where, **options))
        if local_folder(model) is None:
            wrong += pickled_on_hub(model, content)
        if wrong:
            raise ConfigErrors(wrong)
        return AutoConfig.from_pretrained(where, trust_remote_code=False, **options)

    config = _call(model, load)
    for part, key, _ in _random_settings(config):
        setattr(part, key, 0.0)
    if classes:
        config.num_labels = classes
    return config


def skeleton(model: ModelConfig, classes: int = 0) -> PreTrainedModel:
    """The model on the meta device: every name and shape, no weights."""
    import torch

    config = architecture(model, classes)
    loader = tasks.model_class(config, classes, model_name(model))
    name = model.attn_implementation
    try:
        # Quiet: transformers advises on an encoder that `tasks.check` refuses below.
        with torch.device("meta"), _quiet_loading(True):
            built = loader.from_config(
                config,
                # Others are for a GPU that may be elsewhere, or are fetched from the Hub and run.
                attn_implementation=name if name in kernels.PLAIN else "eager",
                dtype=dtype(resolved(model).dtype),
                trust_remote_code=False,
            )
    except (ValueError, ImportError) as error:
        if name == "sdpa" and "scaled_dot_product_attention" in str(error):
            kind = first_line(error).partition(" ")[0]
            raise ConfigErrors(
                f"model.attn_implementation: must be one that {kind} of '{model.path}' has; got "
                f"sdpa; set model.attn_implementation=eager"
            ) from error
        why = first_line(error)
        raise ConfigErrors(f"model.path: '{model.path}' cannot be built: {why}") from error
    if name not in kernels.PLAIN:
        if misfit := kernels.misfit(built, name):
            raise ConfigErrors(misfit)
        built.config._attn_implementation = name
    tasks.check(built, classes, model_name(model))
    if not classes and (wrong := fits.other_shapes(model, built.state_dict())):
        raise ConfigErrors(wrong)
    return built


def load(model: ModelConfig, device: str, classes: int = 0) -> PreTrainedModel:
    """The frozen base on its device, in evaluation mode, no parameter trainable.

    Args:
        classes: of a classification, whose head is zero here; 0: a language model.
    """
    import torch

    config = architecture(model, classes)
    kernels.must_be_here(model.attn_implementation)
    on_host = torch.device(device).type == "cpu"
    # Tensor by tensor to the device; the host never holds the model, not even to cast it.
    options: dict[str, Any] = {} if on_host else {"device_map": {"": device}}
    if classes:  # a checkpoint that is a classifier itself may have another number of them
        options["ignore_mismatched_sizes"] = True
    if kernels.is_of_hub(model.attn_implementation):  # allowed by name: `kernels.errors`
        options["allow_all_kernels"] = True
    with _quiet_loading(bool(classes)):
        base, loaded = _call(
            model,
            tasks.model_class(config, classes, model_name(model)).from_pretrained,
            config=config,
            attn_implementation=model.attn_implementation,
            dtype=dtype(resolved(model).dtype),
            output_loading_info=True,
            **NO_CODE,
            **options,
        )
    _must_be_alone(base, model)
    if classes:
        tasks.blank_head(base, loaded, model_name(model))
    else:
        _must_be_whole(base, sorted(loaded["missing_keys"]), model)
    for module in base.modules():  # a rate that an architecture has in its code
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    base.requires_grad_(False)
    base.config.use_cache = False
    if on_host:
        _copy_off_the_file(base)
    return base.to(device).eval()


def _copy_off_the_file(base: PreTrainedModel) -> None:
    """Give every tensor memory of its own, one at a time: safetensors maps the file.

    A mapped tensor changes with the file, and ends the process where the file was truncated.
    """
    for tensor in [*base.parameters(), *base.buffers()]:  # tied ones come once, and stay tied
        tensor.data = tensor.data.clone()


def plain(model: ModelConfig, auto: Any, dtype_name: str, **options: Any) -> Any:
    """The base as `auto`, an Auto class, loads it: its own config, nothing switched off, CPU."""
    if "num_labels" in options:  # of a checkpoint that is a classifier itself
        options["ignore_mismatched_sizes"] = True
    with _quiet_loading("num_labels" in options):
        base = _call(model, auto.from_pretrained, dtype=dtype(dtype_name), **NO_CODE, **options)
    _must_be_alone(base, model)
    return base.eval()


def tokenizer(model: ModelConfig) -> Any:
    """The base's own tokenizer."""
    from transformers import AutoTokenizer

    def load(where: str, **options: Any) -> Any:
        try:
            return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
        except ValueError as error:
            if "backend tokenizer" not in str(error):
                raise
            raise ConfigErrors(
                f"model.path: a base must come with its tokenizer's vocabulary; '{model.path}' has "
                f"a tokenizer_config.json without one; put the files of its tokenizer "
                f"(tokenizer.json) beside config.json"
            ) from error

    return _call(model, load)


def stops(model: ModelConfig) -> list[int]:
    """Return the ids at which the base ends a generation, by its generation_config.json.

    Without that file, what transformers makes of config.json.
    """
    from transformers.utils import cached_file

    def find(where: str, **options: Any) -> Any:
        return cached_file(
            where,
            "generation_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )

    path = _call(model, find)
    content = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    found = content.get("eos_token_id")
    if found is None:
        found = getattr(architecture(model).get_text_config(), "eos_token_id", None)
    found = found if isinstance(found, list) else [found]
    return sorted(id for id in found if id is not None)


def _call(model: ModelConfig, load: Callable[..., Any], **options: Any) -> Any:
    """A transformers loader on this base, its failures as one line."""
    folder = local_folder(model)
    if errors := adapter_beside(model):
        raise ConfigErrors(errors)
    if folder is None:
        options["revision"] = model.revision or "main"
        must_be_reachable(model)
    try:
        return load(location(model), **options)
    except (OSError, ConnectionError) as error:
        if folder is None:
            raise ConfigErrors(hub_failure("model.path", model.path, error)) from error
        raise ConfigErrors(
            f"model.path: '{model.path}' does not load: {first_line(error)}"
        ) from error
    except ConfigErrors:
        raise
    except ValueError as error:  # a file this transformers does not know
        why = first_line(error)
        raise ConfigErrors(f"model.path: '{model.path}' does not load: {why}") from error
    except ImportError as error:  # a kernel whose package does not run here
        raise ConfigErrors(f"{kernels.KEY}: {first_line(error)}") from error


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


def _must_be_alone(base: PreTrainedModel, model: ModelConfig) -> None:
    """Refuse a base, from the hub, on which transformers has put the adapter beside it."""
    if getattr(base, "_hf_peft_config_loaded", False):
        raise ConfigErrors(beside(model))


def _must_be_whole(base: PreTrainedModel, missing: list[str], model: ModelConfig) -> None:
    """Refuse a checkpoint without some weights: transformers draws them at random, and goes on."""
    if missing:
        raise ConfigErrors(
            f"model.path: a checkpoint must hold every weight of {type(base).__name__}; "
            f"'{model.path}' lacks {and_more(missing)}, which would be random; save the whole "
            f"model with save_pretrained, or correct tie_word_embeddings in its config.json"
        )
