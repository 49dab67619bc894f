"""Tasks of the reasoning-gym library: generated examples, and the library's scores of answers.

A task makes questions without end from a seed. The hash of a question decides its split (half of
all questions are train, a quarter validation, a quarter test), so that no question is in two
splits, whatever the seed, and a larger split moves no example of another. Within a split no
question comes twice. A longer list begins with the shorter one, and the tasks take turns.

Refused are tasks that break what lorabench promises: examples that differ between processes, and,
for the metric, scorers that run what a model wrote as Python code.

reasoning_gym is imported when the first task is made (seconds: it imports sympy and matplotlib).
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import textwrap
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from lorabench.config import ConfigErrors, DataConfig, and_more, did_you_mean, nearest
from lorabench.config.errors import first_line
from lorabench.data import templates
from lorabench.data.rows import identified
from lorabench.data.templates import SPLITS
from lorabench.versions import installed

PACKAGE = "reasoning-gym"
# Tasks whose examples depend on PYTHONHASHSEED or on the global random state.
VARYING = frozenset(
    {
        "codeio", "isomorphic_strings", "knight_swap", "list_functions",
        "polynomial_multiplication", "ransom_note", "word_ladder",
    }
)  # fmt: skip
QUARTERS = {"train": (0, 1), "validation": (2,), "test": (3,)}  # of all questions, by their hash
CHUNK = 500  # questions per dataset object
PATIENCE = 1000  # questions in a row that may bring none that is new to a split
OWN_SETTINGS = {"seed": "data.gym_seed", "size": "data.num_train and the like"}
RUN_AS_CODE = ("eval", "exec", "parse_expr", "sympify", "simplify")  # the last three call eval


class Entry(NamedTuple):
    """A question with its answer, and the object that scores answers to it."""

    dataset: Any  # reasoning_gym's ProceduralDataset
    item: dict[str, Any]  # question, answer, metadata


def errors(cfg: DataConfig) -> list[str]:
    """Return everything wrong with the tasks of `data.gym` and their settings, one line each.

    Takes up where `config.range_errors` ends. Questions are generated only if all else is right.
    """
    if installed(PACKAGE) is None:
        return [
            f"data.source: gym needs the package {PACKAGE}, which is not installed; "
            "pip install 'lorabench[gym]', or use data=skills"
        ]
    found = [
        f"data.num_{split}: must be given with data.source=gym, questions are made to order; "
        f"got None; set data.num_{split}=512"
        for split in SPLITS
        if getattr(cfg, f"num_{split}") is None
    ]
    wanted, template_errors = templates.wanted_of(dataclasses.replace(cfg, split_by=None), "train")
    found += template_errors
    columns = {**wanted.columns, **wanted.optional}
    found += templates.unknown_columns(columns, ["question", "answer"], "data.source=gym")
    for task, settings in (cfg.gym or {}).items():
        found += _task_errors(str(task), settings or {}, "gym" in cfg.metric)
    if found:
        return found
    for split in SPLITS:
        try:
            entries(cfg, split)
        except ConfigErrors as error:
            found += error.errors
    return list(dict.fromkeys(found))


def examples(cfg: DataConfig, split: str) -> list[tuple[str, str]]:
    """Return (prompt, completion) of each generated question of a split.

    Raises:
        ConfigErrors: As `entries`.
    """
    parts = [templates.parse(text) for text in (cfg.prompt, cfg.completion)]
    return [
        (templates.render(parts[0], item), templates.render(parts[1], item))
        for _, item in entries(cfg, split)
    ]


def entries(cfg: DataConfig, split: str) -> list[Entry]:
    """Return the generated questions of a split, the tasks taking turns.

    Raises:
        ConfigErrors: A task that cannot make a question with these settings, gives no answer to
            one, or has too few.
    """
    count, turns = getattr(cfg, f"num_{split}"), []
    for turn, (task, settings) in enumerate(cfg.gym.items()):
        wanted = len(range(turn, count, len(cfg.gym)))
        stream = _stream(task, json.dumps(settings or {}, sort_keys=True), cfg.gym_seed)
        turns.append(stream.take(split, wanted))
    return [turns[place % len(turns)][place // len(turns)] for place in range(count)]


def scorer(cfg: DataConfig) -> Callable[[str, str | None], float]:
    """Return a function of an example's id and an answer: reasoning-gym's score, in [0, 1].

    It is 0 where the library's scorer fails on what it cannot read.

    Raises:
        ConfigErrors: As `entries`.
    """
    ids: dict[str, Entry] = {}
    for split in ("validation", "test"):
        pairs = zip(identified(examples(cfg, split)), entries(cfg, split), strict=True)
        ids.update((example.id, entry) for example, entry in pairs)

    def score(id: str, answer: str | None) -> float:
        dataset, item = ids[id]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, for example, on an empty matrix
            try:
                value = float(dataset.score_answer(answer, item))
            except Exception:  # anything: the scorers parse what a model wrote
                return 0.0
        assert 0 <= value <= 1, f"reasoning-gym's scores are in [0, 1]; got {value}"
        return value

    return score


def _task_errors(task: str, settings: dict[str, Any], scored: bool) -> list[str]:
    """Return what is wrong with one task and its settings; nothing is generated.

    Args:
        scored: Whether the metric is asked for.
    """
    known, key = _tasks(), f"data.gym.{task}"
    if task not in known:
        remedy = "" if nearest(task, known) else f"; use one of {and_more(sorted(known), 8)}"
        asked = f"must name tasks of {PACKAGE} {installed(PACKAGE)}"
        return [f"data.gym: {asked}; got {did_you_mean(task, known)}{remedy}"]
    if task in VARYING:
        return [
            f"{key}: must be a task whose questions are the same in every process; got one whose "
            "questions depend on Python's hash seed; use another task"
        ]
    dataset_class, config_class = known[task]
    if scored and _runs_code(dataset_class):
        return [
            f"{key}: must be a task whose scorer only reads what the model writes, with metric "
            "gym; this one runs it as Python code; use data.metric=[nll,exact_match], or another "
            "task"
        ]
    found = []
    fields = {one.name: one for one in dataclasses.fields(config_class)}
    free = [name for name in fields if name not in OWN_SETTINGS]
    law: str | None
    for name, value in settings.items():
        if name in OWN_SETTINGS:
            found.append(
                f"{key}.{name}: must be left out; got {value!r}; set {OWN_SETTINGS[name]} instead"
            )
        elif name not in fields:
            got = did_you_mean(str(name), free)
            found.append(f"{key}.{name}: no such setting; got {got}; use one of {', '.join(free)}")
        elif law := _type_law(fields[name], value):
            found.append(f"{key}.{name}: must be {law}; got {value!r}")
    if found:
        return found
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset_class(config_class(**settings, seed=0, size=1))
    except Exception as error:  # the library's own checks are asserts, and whatever comes of them
        found.append(_refused(key, settings, error))
    return found


def _type_law(field: Any, value: Any) -> str | None:
    """Return what a setting must be, going by its default; None where the value is that."""
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        default = field.default
    laws: list[tuple[type, tuple[type, ...], str]] = [
        (bool, (bool,), "true or false"),
        (int, (int,), "a whole number"),
        (float, (int, float), "a number"),
        (str, (str,), "a text"),
        (list, (list,), "a list"),
        (tuple, (list,), "a list"),
        (dict, (dict,), "a mapping"),
    ]
    for kind, allowed, law in laws:
        if isinstance(default, kind):
            fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
            return None if fits else law
    return None


def _refused(key: str, settings: dict[str, Any], error: BaseException) -> str:
    reason = first_line(error).rstrip(". ")
    return f"{key}: must be settings that {PACKAGE} accepts; got {settings}: {reason}; correct them"


def _tasks() -> dict[str, tuple[type, type]]:
    """Return the dataset and the config class of each task that can be asked for."""
    import reasoning_gym  # noqa: F401 - registers the tasks
    from reasoning_gym.factory import DATASETS

    # composite mixes tasks: data.gym does that itself.
    return {name: both for name, both in DATASETS.items() if name != "composite"}


@lru_cache(maxsize=256)
def _runs_code(dataset_class: type) -> bool:
    """Return whether a scorer passes the answer to eval or to what calls it, as sympy's parser.

    Read from its source, so that it also holds for versions of the library yet to come.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(dataset_class.score_answer)))  # type: ignore[attr-defined]
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func
        name = name.id if isinstance(name, ast.Name) else name
        inner = [one for arg in call.args for one in ast.walk(arg) if isinstance(one, ast.Name)]
        if name in RUN_AS_CODE and any(one.id != "entry" for one in inner):
            return True
    return False


class _Stream:
    """The questions of one task in order, sorted into splits as far as they were asked for."""

    def __init__(self, task: str, settings: dict[str, Any], seed: int):
        self.task, self.settings = task, settings
        self._first_seed = int(_hash(f"{seed} {task}")[:8], 16) // 2
        self._num_drawn = 0
        self._dataset: Any = None
        self._found: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        self._newest = dict.fromkeys(SPLITS, 0)  # questions drawn when the last new one came
        self._seen: set[str] = set()

    def take(self, split: str, count: int) -> list[Entry]:
        """Return the first `count` questions of a split.

        Raises:
            ConfigErrors: There are not so many, or one cannot be made.
        """
        found, key = self._found[split], f"data.gym.{self.task}"
        while len(found) < count:
            if self._num_drawn - self._newest[split] > PATIENCE:
                raise ConfigErrors(
                    f"data.num_{split}: must be at most the {len(found)} different questions that "
                    f"{key} was found to have for this split; got {count}; ask for fewer, or "
                    "give settings with more questions"
                )
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    entry = self._draw()
            except Exception as error:
                raise ConfigErrors(_refused(key, self.settings, error)) from error
            answer, question = entry.item["answer"], entry.item["question"]
            if not isinstance(answer, str) or not answer.strip():
                raise ConfigErrors(
                    f"{key}: must be a task with an answer to train on; got {answer!r} for "
                    f"{question!r:.60}; use another task"
                )
            self._keep(entry, question)
        return found[:count]

    def _draw(self) -> Entry:
        place = self._num_drawn % CHUNK
        if place == 0:
            dataset_class, config_class = _tasks()[self.task]
            seed = self._first_seed + self._num_drawn
            self._dataset = dataset_class(config_class(**self.settings, seed=seed, size=CHUNK))
        self._num_drawn += 1
        return Entry(self._dataset, self._dataset[place])

    def _keep(self, entry: Entry, question: str) -> None:
        quarter = int(_hash(question)[:8], 16) % 4
        split = next(name for name, quarters in QUARTERS.items() if quarter in quarters)
        # A split that has ended stays so, whichever split the drawing goes on for.
        ended = self._num_drawn - self._newest[split] > PATIENCE + 1
        if question not in self._seen and not ended:
            self._seen.add(question)
            self._found[split].append(entry)
            self._newest[split] = self._num_drawn


@lru_cache(maxsize=16)
def _stream(task: str, settings: str, seed: int) -> _Stream:
    return _Stream(task, json.loads(settings), seed)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
