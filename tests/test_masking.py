"""Secrets reach no file: planted in the environment and typed, then searched for in every byte."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from conftest import SHORT_RUN, records, say
from processes import running

from lorabench import masking

ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_planted_in_the_environment",
    "MY_PASSWORD": "pass word with spaces, quotes \" ' and \\ that YAML folds and JSON escapes, ü",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "db.secret": "planted-dotted-name",
}
TYPED = ["typed-value-one", "typed-value-two", "typed, quoted 'value'", "typed-default-value"]
OPEN = {"PLAIN_VALUE": "everyone-may-see-this", "SHORT_KEY": "seven77", "KEYS": "not-a-secret-name"}


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (ENVIRONMENT | OPEN).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DB_URL", "postgres://user:pass-word-9@host/name")
    yield


def found_in(folder: Path, secret: str) -> list[str]:
    """The files that hold a text, as it is or as JSON, Python, YAML or a URL write it."""
    forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe="")}
    forms |= {yaml.dump(secret, width=10**6).strip().strip("'\"")}
    # Its first words as well: a text that is folded stands in no line as a whole.
    forms |= {" ".join(secret.split()[:3])}
    searched = [path for path in folder.rglob("*") if path.is_file()]
    assert searched
    return [
        str(path)
        for path in searched
        if any(form.encode() in path.read_bytes() or form in path.name for form in forms)
    ]


def words(tmp_path: Path, *more: str) -> list[str]:
    typed = [
        f"+hydra.job.env_set.MY_TOKEN={TYPED[0]}",
        f"+hydra.job.env_set={{OTHER_SECRET: {TYPED[1]}}}",
        f'''+hydra.job.env_set.third_key="{TYPED[2]}"''',
        'tracker.tags=["${oc.env:HF_TOKEN}","${oc.env:PLAIN_VALUE}",'
        f'"${{oc.env:NO_PASSWORD,{TYPED[3]}}}","https://me:typed-url-password@host/x"]',
    ]
    return [*SHORT_RUN, *typed, f"output_dir={tmp_path / 'out'}", *more]


SECRETS = [*ENVIRONMENT.values(), *TYPED, "pass-word-9", "typed-url-password"]


def fails_with_secrets() -> None:
    """In the child: training fails, and its message names everything."""
    from lorabench import train
    from lorabench.worker import training

    def fail(*_: Any, **__: Any) -> None:
        told = " | ".join([*ENVIRONMENT.values(), os.environ["DB_URL"], *TYPED])
        logging.getLogger("any.library").warning("connecting to %s", told)
        raise RuntimeError(told)

    for module in (train, training):
        for name in ("train", "run", "steps", "_train"):
            if hasattr(module, name):
                setattr(module, name, fail)


def test_a_run_that_fails_with_a_secret_in_its_message_leaves_none(tmp_path: Path) -> None:
    """In files of lorabench, of Hydra and of Hydra's loggers, and in what was printed."""
    told = words(tmp_path, "hydra/job_logging=default", "hydra/hydra_logging=default")
    with running(tmp_path / "said", "train", *told, before=fails_with_secrets) as process:
        assert process.wait() == 1, process.said
    for secret in SECRETS:
        assert found_in(tmp_path, secret) == []
    ((run, record),) = records(tmp_path / "out").items()
    assert record["error"].startswith("RuntimeError: ***")
    log = (tmp_path / "out" / "default" / run / "train.log").read_text()
    assert "Traceback" in log and "connecting to ***" in log and "postgres://***@host/name" in log
    assert record["config"]["tracker"]["tags"][:2] == ["***", OPEN["PLAIN_VALUE"]]
    assert "+hydra.job.env_set.MY_TOKEN=***" in record["provenance"]["command"]
    hydras = tmp_path / "out" / "default" / run / ".hydra"
    assert "- +hydra.job.env_set.MY_TOKEN=***" in (hydras / "hydra.yaml").read_text()
    assert yaml.safe_load((hydras / "overrides.yaml").read_text())[: len(SHORT_RUN)] == SHORT_RUN


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["packed", "basic"])
def test_a_sweep_with_wandb_leaves_no_secret(launcher: str, tmp_path: Path) -> None:
    """Under both launchers; the W&B files hold what is no secret, so the search can find it."""
    told = words(tmp_path, "seed=0,1", "tracker=wandb", "tracker.mode=offline")
    told.remove("tracker=none")
    told += [f"hydra/launcher={launcher}", "hydra/job_logging=default"]
    with running(tmp_path / "said", "train", "-m", *told) as process:
        assert process.wait() == 0, process.said
    for secret in SECRETS:
        assert found_in(tmp_path, secret) == []
    found = found_in(tmp_path, OPEN["PLAIN_VALUE"])
    assert {"wandb", "json", "yaml"} <= {path.rpartition(".")[2] for path in found}
    (sweep,) = (tmp_path / "out").glob("*/sweep.json")
    command, *_ = json.loads(sweep.read_text())["commands"]  # the basic launcher writes one per run
    assert "+hydra.job.env_set.MY_TOKEN=***" in command["words"]
    assert say("evaluate", sweep.parent, "data.metric=[nll_per_token]").code == 0
    assert say("runs", sweep.parent, "--verify").code == 0


def test_a_secret_in_the_environment_changes_neither_the_run_nor_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where its value is one that the run has: it is masked where it is written only."""
    base = [*SHORT_RUN, "trainer.device=cpu"]
    assert say("train", *base, f"output_dir={tmp_path / 'plain'}").code == 0
    monkeypatch.setenv("SOME_KEY", "attention")
    assert say("train", *base, f"output_dir={tmp_path / 'masked'}").code == 0
    (plain,) = records(tmp_path / "plain").values()
    (masked,) = records(tmp_path / "masked").values()
    assert plain["run_id"] == masked["run_id"]
    assert plain["hashes"]["adapter"] == masked["hashes"]["adapter"]
    assert masked["config"]["target_modules"]["select"] == "***"


def test_what_holds_no_secret_is_written_as_it_is(tmp_path: Path) -> None:
    texts = [
        *OPEN.values(), "http://host:8080/a@b", "git@host:me/x", "${oc.env:HF_TOKEN}", "a.token=b",
        "eos_token", "data.answer_max_new_tokens=256", "outputs/lm_head",
    ]  # fmt: skip
    content = {"eos_token": "</s>", "train_tokens": 123456789, "key": [1234567, None, True]}
    with masking.applied(["a.token=b", "data.answer_max_new_tokens=256", "lora.r=16"]):
        assert masking.mask(texts) == texts
        assert masking.mask(content) == content


@pytest.mark.parametrize(
    ("word", "secrets"),
    [
        ("+a.api_key=abcdefgh", {"abcdefgh"}),
        ("++a.TOKEN=abcdefg", set()),
        ("a.tokens=abcdefgh", set()),
        ("a.key=abcdefgh,ijklmnop", {"abcdefgh", "ijklmnop", "abcdefgh,ijklmnop"}),
        ("a.key='abcd,efgh'", {"abcd,efgh", "'abcd,efgh'"}),
        ("a={b_password:abcdefgh,c:ijklmnop}", {"abcdefgh"}),
        ("a.key=123456789", {"123456789"}),
        ("a.key=[abcdefgh,1]", {"abcdefgh", "[abcdefgh,1]"}),
        ("a.key=abcdefgh(", {"abcdefgh("}),
        ('a={"b.token": abcdefgh}', {"abcdefgh"}),
        ("a.key=${oc.env:PLAIN_VALUE}", {OPEN["PLAIN_VALUE"]}),
        ("a.b=${oc.env:PLAIN_VALUE}", set()),
        ("a.b=${oc.env:NO_TOKEN,abcdefgh}", {"abcdefgh"}),
    ],
)
def test_secrets_of_a_word(word: str, secrets: set[str]) -> None:
    assert masking.typed([word]) == secrets


def test_nothing_is_left_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with masking.applied(["+a.token=abcdefgh"]):
        print("abcdefgh")
    print("abcdefgh")
    assert capsys.readouterr().out == "***\nabcdefgh\n"
    assert logging.getLogRecordFactory() is logging.LogRecord
