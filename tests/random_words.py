"""Command lines as nobody plans them: from the real keys and groups, seeded.

`line(seed)` is the same words for ever as long as conf/ and the schema stay as they are.
"""

from __future__ import annotations

import random
from pathlib import Path

from lorabench import cli, config

CONF = Path(cli.conf_folder())
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir()
}
KEYS = config.keys()
# What makes a plan small, so that a line that is accepted costs little.
SMALL = ["data.num_train=8", "data.num_validation=2", "data.num_test=2", "tracker=none"]

PLAIN = [
    "", "0", "1", "-1", "3", "1.5", "1e400", "-1e400", "inf", "nan", "1e-320", str(10**30),
    str(-(2**63)), "0x10", "1_000", "true", "false", "null", "None", "abc", "x y", "...", ".", "..",
    "/", "~", "/dev/null", "/nowhere/at/all", "/etc/passwd", "a" * 300, "a" * 5000, "ä", "日本語",
    "\u202e", "\ud7ff", "\t", "'", '"', "'a'", '"a"', "\\", "\\'", "{", "}", "[", "]", "[]", "{}",
    "[1,2]", "[a]", "[[1],[2]]", "[null]", "[{a:1}]", "{a:1}", "{a:{b:2}}", "{a}", "{1:2}", "[1,{",
    "a:b", "a=b", "=", "==", ",", "a,", ",a", "a,,b", "$", "${", "${}", "${seed}", "${nosuch}",
    "${trainer}", "${oc.env:HOME}", "${oc.env:LORABENCH_NONE}", "${oc.env:LORABENCH_NONE,3}",
    "${oc.select:nosuch,7}", "${oc.decode:'{'}", "${oc.create:{a:1}}", "${hydra:job.name}",
    "${hydra:runtime.cwd}", "${run_id:}", "${run_id:1}", "${nosuch:1}", "${sweep}", "${output_dir}",
    "${oc.env:HOME}/${seed}", "???", "*", "?", "%s", "%(x)s", "{0}", "!!python/name:os.system",
    "lorabench:tiny-gemma", "lorabench:", "lorabench:../x", "gpt2", "-rf", "--json", "#", "a#b",
    "1,2", "exclude,lora", "range(3)", "range(1,0)", "range(0)", "range(1,2,0)", "glob(*)",
    "glob(nothing*)", "choice(1,2)", "choice()", "interval(0,1)", "sort(3,1)", "shuffle(1,2)",
    "tag(a,1)", "int(x)", "float(1)", "str(1)", "bool(x)", "json_str(1)", "nosuch(1)",
    "extend_list(1)",
]  # fmt: skip
HYDRA = [
    "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir", "hydra.output_subdir", "hydra.mode",
    "hydra.job.chdir", "hydra.job.name", "hydra.job.env_set.X", "hydra.job.config.override_dirname",
    "hydra.launcher", "hydra.launcher.pack_size", "hydra.launcher._target_", "hydra.sweeper",
    "hydra.sweeper.params", "hydra.sweeper.params.seed", "hydra.sweeper.max_batch_size",
    "hydra.sweeper._target_", "hydra.verbose", "hydra.searchpath", "hydra.help.template",
    "hydra.callbacks", "hydra.runtime.cwd", "hydra.overrides.task", "hydra.nosuch", "hydra",
    "hydra.job_logging", "hydra.hydra_logging.root.level", "hydra/launcher", "hydra/sweeper",
    "hydra/help", "hydra/job_logging", "hydra/hydra_logging", "hydra/output", "hydra/env",
    "hydra/nosuch", "hydra/hydra_help", "hydra/callbacks",
]  # fmt: skip
HYDRA_VALUES = [
    "packed", "basic", "default", "none", "disabled", "colorlog", "submitit_local", "RUN",
    "MULTIRUN", "[root]", "[file:///nowhere]", "[pkg://nosuch]", "[pkg://json]", "nosuch.Class",
    "{seed:'0,1'}", "{hydra.run.dir:'a,b'}", "{a:{_target_:nosuch.b}}", "DEBUG", "[lorabench]",
]  # fmt: skip
FLAGS = [
    ["-m"], ["--multirun"], ["-r"], ["--run"], ["--cfg", "job"], ["--cfg", "hydra"],
    ["--cfg", "all"],
    ["--cfg", "nosuch"], ["--cfg"], ["--cfg=job"], ["-c", "job", "--resolve"], ["--resolve"],
    ["--cfg", "job", "--package", "trainer"], ["--cfg", "job", "--package", "nosuch.at.all"],
    ["-c", "job", "-p", "_global_"], ["--package", "x"], ["--info"], ["--info", "all"],
    ["--info", "defaults-tree"], ["--info", "nosuch"], ["--info", "plugins"], ["--info", "config"],
    ["--info", "searchpath"], ["-cd", "/nowhere"], ["--config-dir", "/tmp"], ["--config-dir=/etc"],
    ["--config-dir"], ["-cp", "/nowhere"], ["--config-path", "conf"], ["-cn", "nosuch"],
    ["-cn", "model/gpt2"], ["--config-name", "train"], ["--config-name"], ["--json"], ["--jsno"],
    ["-h"], ["--help"], ["--hydra-help"], ["--version"], ["-x"], ["--"], ["-"], ["-m", "-m"],
    ["--experimental-rerun", "/nowhere"], ["--smok"], ["-mm"], ["--multirun=1"],
    ["-sc", "query=bash"],
    ["--cfg", "job", "-m"], ["--shell-completion"],
]  # fmt: skip
BARE = [
    "word", "a b", "", " ", "=", "=1", "~", "+", "++", "@", "~=", "+=1", "seed", "trainer", "a/b",
    "~trainer", "~nosuch", "~seed", "~data.train", "~hydra", "~hydra.run", "~model=gpt2",
    "~trainer@x", "~head=exclude", "trainer@seeds=smoke", "trainer@=smoke", "trainer@:x=smoke",
    "data@train:test=jsonl", "+trainer@trainer2=smoke", "+experiment=lm_head", "+model=gpt2",
    "++model=gpt2", "+hydra/launcher=basic", "override hydra/launcher=basic", "defaults=[]",
    "+defaults=[x]", "_self_=1", "_target_=os.system", "+_target_=x", "trainer._target_=x",
    "schema=1", "schema=null", "../x=1", "a..b=1", ".a=1", "a.=1", "a[0]=1", "stages[0]=1",
    "stages.0=1", "stages.0.train=[a]", "data.metric.0=nll", "data.metric[0]=nll",
    "lora.rank_pattern.q_proj=8", "+lora.rank_pattern={q_proj:x}", "+lora.rank_pattern.a.b=1",
    "+lora.alpha_pattern={a:{b:1}}", "seed.x=1", "+seed.x=1", "head.policy.x=lora",
    "trainer.lr=${trainer.eps} trainer.eps=${trainer.lr}", "+a.b.c.d=1", "+{a}=1", "+a={",
    "ä=1", "+ä=1", "k" * 300 + "=1", "seed=0\n", "\nseed=0", "seed =0", "seed= 0", " seed=0",
    "tracker.tags=[a,b]", "tracker.tags=[[a]]", "data.skills=[upper,nosuch]", "data.labels=[1,2]",
    "data.metric=[[a]]", "data.labels=[null]", "data.answer_stop=[[a],{b:1}]", "experiment=null",
    "lora.r=1e400", "trainer=1e400", "sweep=..", "sweep=/x", "sweep=a/b", "output_dir=",
]  # fmt: skip
CYCLES = [
    ["trainer.lr=${trainer.eps}", "trainer.eps=${trainer.lr}"],
    ["seed=${seeds.init}"],
    ["output_dir=${output_dir}"],
    ["sweep=${sweep}"],
    ["sweep=${run_id:}"],
    ["trainer=${trainer}"],
    ["+head=lora", "head=lora"],
    ["seed=0", "seed=1"],
    ["seed=${oc.select:seeds.data}"],
    ["+a=${b}", "+b=${a}"],
]


def value(draw: random.Random) -> str:
    """What stands behind the sign."""
    kind = draw.random()
    if kind < 0.75:
        return draw.choice(PLAIN)
    if kind < 0.85:
        return "".join(draw.choices("ab01.,:=[]{}()'\"\\$*@+~ -_/é", k=draw.randint(1, 12)))
    return draw.choice((",", "", " ", "/")).join(draw.choices(PLAIN, k=2))


def word(draw: random.Random) -> list[str]:
    """One thing that a user may write; most are one word."""
    kind = draw.random()
    sign = draw.choice(["", "", "", "", "+", "++", "~"])
    if kind < 0.3:
        return [f"{sign}{draw.choice(KEYS)}={value(draw)}"]
    if kind < 0.5:
        group, names = draw.choice(sorted(GROUPS.items()))
        at = draw.choice(["", "", "", "@", "@nosuch", f"@{draw.choice(KEYS)}"])
        named = draw.choice(names) if draw.random() < 0.5 else value(draw)
        return [f"{sign}{group}{at}={named}"]
    if kind < 0.65:
        chosen = draw.choice(HYDRA_VALUES) if draw.random() < 0.5 else value(draw)
        return [f"{sign}{draw.choice(HYDRA)}={chosen}"]
    if kind < 0.75:
        return draw.choice(FLAGS)
    if kind < 0.9:
        return [draw.choice(BARE)]
    if kind < 0.94:
        return draw.choice(CYCLES)
    key = draw.choice(KEYS)
    swapped = key.replace("r", "", 1) if draw.random() < 0.5 else f"{key}.{draw.choice(KEYS)}"
    return [f"{sign}{swapped}={value(draw)}"]


def line(seed: int) -> list[str]:
    """The words behind `lorabench plan`, in the order of a user who does not care."""
    draw = random.Random(seed)
    words = [part for _ in range(draw.choice([1, 1, 1, 2, 2, 3, 4])) for part in word(draw)]
    if draw.random() < 0.3:
        words.insert(0, "-m")
    return [*SMALL, *words] if draw.random() < 0.7 else [*words, *SMALL]
