"""The verb fetch: what train would need from the Hub, downloaded before."""

from __future__ import annotations

import time

from lorabench.cli.composing import compose
from lorabench.cli.words import refuse_flags

HELP = """\
lorabench fetch [-m] KEY=VALUE ...

downloads what `lorabench train` with the same words needs from the Hub: safetensors weights,
configs and tokenizers of its models, and its data sets; then prints the command for a machine
without a network

exit code 0: all is there; 2: refused"""


def fetch(arguments: list[str]) -> int:
    """lorabench fetch [-m] OVERRIDES"""
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    refuse_flags("fetch", arguments)
    from huggingface_hub import constants

    from lorabench import data, masking
    from lorabench import fetch as fetching
    from lorabench import model as base_model
    from lorabench.config import ConfigErrors, typed
    from lorabench.show.text import size

    if constants.HF_HUB_OFFLINE:
        raise ConfigErrors(
            "fetch: must have a network; got HF_HUB_OFFLINE in the environment; unset it"
        )
    configs = [typed(one) for one in compose(arguments).configs]
    # What this machine can see is refused first; its devices and folders may be others.
    if errors := [e for one in configs for e in base_model.check(one.model) + data.check(one.data)]:
        raise ConfigErrors(dict.fromkeys(errors))
    parts = fetching.needed(configs)
    fetching.check_room(parts)
    for folder in fetching.local_bases(configs):
        print(f"model  {folder}: a folder of this machine, nothing to download")
    begun = time.perf_counter()
    for part in parts:
        there = part.total_bytes - part.missing_bytes
        print(
            f"{part.what:6} {part.name} at {part.commit}: {part.num_files} "
            f"file{'s' if part.num_files > 1 else ''}, "
            f"{size(part.missing_bytes)} to download"
            + (f", {size(there)} there already" if there else ""),
            flush=True,
        )
        print(f"       in {part.get()}")
    seconds = time.perf_counter() - begun
    print(f"all is there, after {seconds:.0f} s; on a machine without a network:")
    print(f"  {fetching.offline_command(masking.mask(arguments))}")
    return 0
