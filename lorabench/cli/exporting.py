"""The verb that writes a run for others to load: export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

from lorabench import imports
from lorabench.cli.telling import Parser
from lorabench.cli.verbs import VERBS

BASE = "model.path="


def export(arguments: list[str]) -> int:
    """lorabench export RUN --to adapter|merged PATH [--dtype DTYPE] [--json] [model.path=FOLDER]"""
    parser = Parser(prog="lorabench export", description=VERBS["export"])
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a finished run, or the beginning of its id"
    )
    parser.add_argument("--to", required=True, metavar="KIND", help="adapter, merged or gguf")
    parser.add_argument(
        "path", type=Path, metavar="PATH", nargs="?", help="a new or an empty folder; none of gguf"
    )
    parser.add_argument(
        "--dtype", help="of merged: float32, bfloat16 or float16; default: the run's model.dtype"
    )
    parser.add_argument("--json", action="store_true", help="what was checked, as JSON")
    parser.epilog = f"{BASE}FOLDER: where the run's base is now, if it was moved"
    places = [word.removeprefix(BASE) for word in arguments if word.startswith(BASE)]
    words = [word for word in arguments if not word.startswith(BASE)]
    options = parser.parse_intermixed_args(words)  # RUN --to KIND PATH

    from lorabench import formats
    from lorabench.config import ConfigErrors, did_you_mean
    from lorabench.export import source
    from lorabench.runs import folder_of

    errors = formats.check_kind(options.to)
    if options.dtype is not None and options.dtype not in source.DTYPES:
        errors.append(
            f"--dtype: must be one of {', '.join(source.DTYPES)}; "
            f"got {did_you_mean(options.dtype, source.DTYPES)}"
        )
    elif options.dtype is not None and options.to != "merged":
        errors.append(f"--dtype: must go with --to merged; got --to {options.to}; leave it out")
    if options.path is None and options.to in ("adapter", "merged"):
        errors.append(f"PATH: must be a new or an empty folder for --to {options.to}; got none")
    if errors:
        raise ConfigErrors(errors)
    base = os.path.expanduser(places[-1]) if places else None
    run = source.open_run(folder_of(options.run, must_exist=False), base)
    if options.to == "gguf":
        _no_gguf(run, run.folder)
    source.check_path(options.path)
    source.check_base(run)

    with imports.heavy():
        from lorabench import show
        from lorabench.export import write

    if options.to == "adapter":
        report = write.to_adapter(run, options.path)
    else:
        report = write.to_merged(run, options.path, options.dtype or run.stored_dtype)
    if options.json:
        show.dump(report | {"path": str(options.path)})
    else:
        print("\n".join([*_lines(report), f"written     {options.path}"]))
    return 0


def _no_gguf(run: Any, folder: Path) -> NoReturn:
    from lorabench import formats, plan
    from lorabench.config import ConfigErrors

    found = run.entry.exports
    reason = found.gguf if found else plan.make(run.config).exports["gguf"]
    if reason == formats.YES:
        reason = "not written yet; llama.cpp's convert_lora_to_gguf.py takes this adapter folder"
    raise ConfigErrors(f"--to gguf: {reason}; the way out: {formats.way_out(reason, str(folder))}")


def _lines(report: dict[str, Any]) -> list[str]:
    """What was checked, one line each."""
    checks = report["checks"]
    lines = [f"run         {report['run_id']}, adapter {report['adapter'][:12]}, as recorded"]
    if report["to"] == "adapter":
        return [
            *lines,
            f"reloaded    by PEFT: {checks['tensors']} tensors on {checks['modules']} modules",
        ]
    lines.append(f"compared    with PEFT's own logits on {checks['on']}")
    for name in ("merged", "reloaded"):
        if name in checks:
            off = [f"{value:.1e} ({arithmetic})" for arithmetic, value in checks[name].items()]
            decides = " in float64" if "float64" in checks[name] else ""
            lines.append(
                f"{name:12}off by {', '.join(off)} of the largest logit "
                f"(at most {checks['max_difference']:g}{decides})"
            )
    if checks["untied"]:
        lines.append("head        untied: a weight of its own, tie_word_embeddings=false")
    if checks["embeddings_unchanged"]:
        lines.append(f"embeddings  unchanged, bit for bit{_in(report['dtype'])}")
    if "rounding" in checks:
        found = checks["rounding"]
        lines.append(
            f"{report['dtype']:12}reloaded: KL {found['kl']:.1e} nats "
            f"(at most {found['max_kl']:.1e}, twice a stochastic rounding's; the adapter's own "
            f"effect: {checks['adapter_kl']:.1e}), same best token at {found['top1']:.1%} of the "
            f"positions (stochastic: {found['draw']['top1']:.1%})"
        )
    return lines


def _in(dtype: str) -> str:
    return "" if dtype == "float32" else f", as {dtype}"
