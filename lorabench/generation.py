"""What the untrained base and saved adapters write after a prompt, many adapters at once.

Runs are grouped by what they share: the base, the precision, and how a prompt becomes tokens. The
adapters of a group form one pack over its base; adapters that cannot share a base forward follow
one by one.

Letters: R runs in the pack, B prompts, L new tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from lorabench import adapters, data, machine
from lorabench import model as base_model
from lorabench.config import Config, ConfigErrors, DataConfig, first_line, model_name
from lorabench.evaluate import continuations, cut, eos_token_ids, greedy
from lorabench.export.source import Run
from lorabench.pack import ModulePack, StackedPack

# Keys of data that decide what a prompt becomes, and where an answer ends.
RULES = (
    "format", "chat_template", "chat_template_kwargs", "add_bos", "answer_stop",
    "answer_max_new_tokens",
)  # fmt: skip


@dataclass
class Answer:
    """What one model wrote after one prompt."""

    text: str  # before the first of data.answer_stop
    num_tokens: int  # generated, the one that ended it included
    ended: str  # eos; stop: at a text of data.answer_stop; length: at the most tokens allowed


@dataclass
class Group:
    """Runs over one base that read a prompt alike."""

    runs: list[Run]
    settings: DataConfig = field(default_factory=DataConfig)
    prompts: list[list[int]] = field(default_factory=list)  # token ids
    tokenizer: Any = None

    @property
    def config(self) -> Config:
        """The config of the first run: what the group shares is the same in all."""
        return self.runs[0].config

    @property
    def label(self) -> str:
        return model_name(self.config.model)


@dataclass
class Written:
    """The answers of a group, one list per prompt in the order of the prompts."""

    group: Group
    base: list[Answer]
    runs: list[list[Answer] | None]  # None: the adapter is not what the run trained
    damaged: dict[str, str] = field(default_factory=dict)  # run id -> what is wrong


def grouped(
    runs: Sequence[Run], prompts: Sequence[str], max_new_tokens: int | None = None
) -> list[Group]:
    """Return runs with the same base and prompt rules together, and their prompts as token ids.

    Args:
        max_new_tokens: of an answer; None: data.answer_max_new_tokens, or less where the positions
            of the base do not suffice.
    Raises:
        ConfigErrors: a prompt that gives no tokens or does not fit, a chat template that refuses
            one, another tokenizer than the runs had. No weights are loaded before.
    """
    found: dict[str, Group] = {}
    for run in runs:
        config = run.config
        rules = {k: v for k, v in dataclasses.asdict(config.data).items() if k in RULES}
        rules["template"] = run.entry.provenance.get("chat_template")
        key = json.dumps([_base_key(run), config.trainer.dtype, rules])
        found.setdefault(key, Group([])).runs.append(run)
    errors: list[str] = []
    # Groups with the same base follow each other, so that it is loaded once.
    order = list(dict.fromkeys(_base_key(group.runs[0]) for group in found.values()))
    groups = sorted(found.values(), key=lambda group: order.index(_base_key(group.runs[0])))
    for group in groups:
        try:
            _prepare(group, prompts, max_new_tokens)
        except ConfigErrors as error:
            errors += error.errors
    if errors:
        raise ConfigErrors(errors)
    return groups


def _base_key(run: Run) -> str:
    model, trainer = run.config.model, run.config.trainer
    which = [run.entry.provenance[name] for name in ("hub", "revision", "weights")]
    return json.dumps([which, model.path, model.dtype, model.attn_implementation, trainer.device])


def _prepare(group: Group, prompts: Sequence[str], max_new_tokens: int | None) -> None:
    """Tokenise the prompts of a group and find how long its answers may be."""
    run = group.runs[0]
    settings = run.data_settings
    planned = _planned(run)
    group.tokenizer = base_model.tokenizer_verified(run.model, planned)
    group.prompts = data.prompt_ids(prompts, group.tokenizer, settings)
    text = base_model.architecture(run.model).get_text_config()
    longest, most = max(map(len, group.prompts)), max_new_tokens or settings.answer_max_new_tokens
    if positions := getattr(text, "max_position_embeddings", None):
        left = positions - longest
        if left < 1 or (max_new_tokens is not None and left < max_new_tokens):
            remedy = f"set --max-new-tokens={left} or less" if left > 0 else "shorten it"
            raise ConfigErrors(
                f"--max-new-tokens: prompt and answer must fit the {positions} positions of base "
                f"model '{group.label}'; got {most} after a prompt of {longest} tokens; {remedy}"
            )
        most = min(most, left)
    group.settings = dataclasses.replace(settings, answer_max_new_tokens=most)


def _planned(run: Run) -> dict[str, str]:
    """The base that a run was trained on, as `model.load_verified` asks for it."""
    return base_model.identity(run.model) | {
        key: value for key, value in run.entry.provenance.items() if isinstance(value, str)
    }


def write(groups: Sequence[Group]) -> list[Written]:
    """Generate greedily by the base and by every run of each group.

    Raises:
        ConfigErrors: the base is not the one that runs were trained on; too little memory for one
            prompt and one run.
    """
    found: list[Written] = []
    base, checksum, loaded = None, "", ""
    for group in groups:
        machine.configure_torch(group.config)
        device = machine.choose_device(group.config.trainer.device)
        if _base_key(group.runs[0]) != loaded:
            base = None  # before the next one is loaded
            base = base_model.load_verified(group.runs[0].model, device, 0, _planned(group.runs[0]))
            checksum, loaded = base_model.checksum(base), _base_key(group.runs[0])
        for run in group.runs:
            if run.entry.hashes["base"] != checksum:
                raise ConfigErrors(
                    f"model.path: must be the base that run {run.entry.run_id} was trained on, "
                    f"checksum {run.entry.hashes['base'][:12]}; '{run.config.model.path}' has "
                    f"{checksum[:12]}; put that base back"
                )
        found.append(_write(group, base, device))
    return found


def _write(group: Group, base: Any, device: str) -> Written:
    def of_base(_: Sequence[Run]) -> Any:
        return ModulePack.of_base(base, group.config, device)

    def alone(runs: Sequence[Run]) -> Any:
        (run,) = runs
        return ModulePack.of_saved(base, run.config, run.folder / "adapter", device)

    def packed(runs: Sequence[Run]) -> Any:
        skeleton = base_model.skeleton(group.runs[0].model)
        configs = [run.config for run in runs]
        modules = [run.entry.plan["lora_modules"] for run in runs]
        pack = StackedPack(base, skeleton, configs, modules, device)
        for slot, run in enumerate(runs):
            pack.load_adapter(slot, _tensors(run.folder))
        return pack

    written = Written(group, _in_packs(group, group.runs[:1], of_base)[0], [])
    whole: list[Run] = []
    for run in group.runs:
        if wrong := _what_is_wrong(run):
            written.damaged[run.entry.run_id] = wrong
        else:
            whole.append(run)
    # Records of early versions do not say whether a run packs; alone every run can be loaded.
    together = [run for run in whole if run.entry.plan.get("alone", "") is None]
    texts: dict[Path, list[Answer]] = {}
    packs = [(together, packed)] if together else []
    packs += [([run], alone) for run in whole if run not in together]
    for runs, make in packs:
        answers = _in_packs(group, runs, make)
        texts |= {run.folder: one for run, one in zip(runs, answers, strict=True)}
    written.runs = [texts.get(run.folder) for run in group.runs]
    return written


def _tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def _what_is_wrong(run: Run) -> str:
    """Say how a saved adapter is not the one its run trained; nothing where it is."""
    wanted = run.entry.hashes["adapter"]
    try:
        found = adapters.state_hash(_tensors(run.folder))
    except (OSError, SafetensorError) as error:
        found = first_line(error)
    if found == wanted:
        return ""
    return (
        f"adapter: must be the one that run {run.entry.run_id} trained, {wanted[:12]}; "
        f"'{run.folder / 'adapter'}' has {found[:60]}; remove '{run.folder}' and repeat the "
        f"command that trained it"
    )


def _in_packs(
    group: Group, runs: Sequence[Run], make: Callable[[Sequence[Run]], Any]
) -> list[list[Answer]]:
    """Return each run's answers, from smaller batches or packs where memory is short."""
    batch_size = group.config.trainer.eval_batch_size
    while True:
        try:
            return _answers(group, make(runs), batch_size)
        except Exception as error:
            if not machine.is_out_of_memory(error):
                raise
        # Outside the handler: the exception held the frames, and they the tensors.
        gc.collect()
        machine.release_memory()
        if batch_size > 1:
            batch_size = (min(batch_size, len(group.prompts)) + 1) // 2
        elif len(runs) > 1:
            half = (len(runs) + 1) // 2
            return [
                *_in_packs(group, runs[:half], make), *_in_packs(group, runs[half:], make),
            ]  # fmt: skip
        else:
            raise ConfigErrors(
                f"trainer.device: must have memory for base model '{group.label}' and one prompt; "
                f"got too little; free memory, or use --device cpu"
            )


def _answers(group: Group, pack: Any, batch_size: int) -> list[list[Answer]]:
    """Return what each run of a pack answers to each prompt."""
    tokenizer, settings = group.tokenizer, group.settings
    ends = eos_token_ids(pack.tree.generation_config, tokenizer)
    config = greedy(settings, ends, data.pad_id(tokenizer))
    found: list[list[Any]] = [[None] * len(group.prompts) for _ in range(pack.size)]
    # Prompts of similar length together: there is less padding before them.
    order = sorted(range(len(group.prompts)), key=lambda i: len(group.prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        written_RBL = continuations(pack, [group.prompts[i] for i in chosen], config)
        for answers, rows in zip(found, written_RBL.tolist(), strict=True):
            for i, ids in zip(chosen, rows, strict=True):
                answers[i] = _answer(ids, ends, tokenizer, settings.answer_stop)
    return found


def _answer(ids: list[int], ends: list[int], tokenizer: Any, stops: list[str]) -> Answer:
    """Return the text before the first end; an end need not be one of the special tokens."""
    length = next((at for at, id in enumerate(ids) if id in ends), None)
    whole = tokenizer.decode(ids[:length], skip_special_tokens=True)
    text = cut(whole, stops)
    ended = "length" if length is None else "eos"
    return Answer(
        text=text,
        num_tokens=len(ids) if length is None else length + 1,
        ended="stop" if text != whole else ended,
    )
