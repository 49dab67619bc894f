"""The packed launcher: Hydra's own suites, and packed multiruns beside basic ones."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import scores
from hydra.experimental.callback import Callback
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from omegaconf import DictConfig
from safetensors.torch import load_file

import hydra_plugins.lorabench_launcher.packed_launcher as plugin
from lorabench import cli

FAST_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FAST = ["tracker=none", "data.num_train=64", "data.num_validation=8", "data.num_test=8"]
SWEEP = [
    *FAST,
    "trainer.steps=12",
    "trainer.batch_size=2",
    "target_modules=attention",
    "trainer.num_threads=1",
    "head=exclude,lora",
    "lora.r=4,8",
]


# Hydra's test apps are written for its older working-directory rule.
@pytest.mark.filterwarnings("ignore:\\s*Future Hydra versions:UserWarning")
# chdir said aloud: another test's application may have left its version_base behind.
@pytest.mark.parametrize(("launcher_name", "overrides"), [("packed", ["hydra.job.chdir=true"])])
class TestPackedLauncher(LauncherTestSuite):
    """Hydra's conformance suite."""


@pytest.mark.slow  # ten processes of two seconds
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=packed"])]
)
class TestPackedLauncherIntegration(IntegrationTestSuite):
    """Hydra's suite of whole applications."""


class Witness(Callback):
    """Notes every callback Hydra makes."""

    seen: list[tuple[str, Any]]
    seen = []  # noqa: RUF012

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        Witness.seen.append(("start", config.lora.r, config.head.policy))

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        status = job_return.status.name
        Witness.seen.append(("end", config.lora.r, config.head.policy, status))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        Witness.seen.append(("multirun end",))


@pytest.mark.slow
def test_a_packed_multirun_is_the_basic_one(tmp_path: Path) -> None:
    """The same multirun under both launchers: Hydra's files, run ids, weights."""
    folders = {}
    for launcher in ("basic", "packed"):
        folder = tmp_path / launcher / "outputs"
        code = cli.main(
            ["train", "-m", *SWEEP, f"hydra/launcher={launcher}", f"output_dir={folder}"]
        )
        assert code == 0
        folders[launcher] = folder / "default"
    check_ids_and_weights(folders)
    check_hydras_files(folders)


def run_ids(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/record.json"))


def check_ids_and_weights(both: dict[str, Path]) -> None:
    ids = run_ids(both["packed"])
    assert ids == run_ids(both["basic"]) and len(ids) == 4
    for run_id in ids:
        sizes = [
            json.loads((both[name] / run_id / "record.json").read_text())["plan"]["pack"]["size"]
            for name in ("basic", "packed")
        ]
        assert sizes == [1, 4]
        mine, theirs = (
            load_file(both[name] / run_id / "adapter" / "adapter_model.safetensors")
            for name in ("packed", "basic")
        )
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            # Float32 rounding of other GEMM shapes, grown by 12 AdamW steps.
            assert (tensor - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), (run_id, name)


def check_hydras_files(both: dict[str, Path]) -> None:
    def content(launcher: str, run_id: str, name: str) -> Any:
        text = (both[launcher] / run_id / ".hydra" / name).read_text()
        loaded = yaml.load(text.replace(str(both[launcher].parent), "OUT"), FAST_YAML)
        if name == "hydra.yaml":
            node = loaded["hydra"]
            assert node["launcher"].pop("_target_").endswith(("PackedLauncher", "BasicLauncher"))
            node["launcher"].pop("pack_size", None)
            assert node["runtime"]["choices"].pop("hydra/launcher") == launcher
            node["overrides"]["hydra"].remove(f"hydra/launcher={launcher}")
        return loaded

    for run_id in run_ids(both["basic"]):
        for name in ("config.yaml", "overrides.yaml", "hydra.yaml"):
            assert content("packed", run_id, name) == content("basic", run_id, name), name
    files = [
        {str(path.relative_to(folder)) for path in folder.glob("*/.hydra/*")}
        for folder in both.values()
    ]
    assert files[0] == files[1] and len(files[0]) == 12


def test_callbacks_fire_for_every_member_and_returns_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.plugins.launcher import Launcher

    assert issubclass(plugin.PackedLauncher, Launcher)
    returned: list[Any] = []
    from hydra_plugins.lorabench_launcher import _core

    launch = _core.launch
    monkeypatch.setattr(
        _core, "launch", lambda *a, **k: returned.append(launch(*a, **k)) or returned[-1]
    )
    monkeypatch.setattr(Witness, "seen", [])
    # DoRA does not pack, so the packs are not in the order of the overrides.
    code = cli.main(
        [
            "train",
            "-m",
            *FAST,
            "trainer.steps=2",
            "lora.r=2,4",
            "lora.use_dora=false,true",
            f"output_dir={tmp_path}",
            f"+hydra.callbacks.witness._target_={__name__}.Witness",
        ]
    )
    assert code == 0
    (jobs,) = returned
    wanted = [[f"lora.r={r}", f"lora.use_dora={dora}"] for r in (2, 4) for dora in (False, True)]
    assert [job.overrides[-3:-1] for job in jobs] == wanted
    assert [job.hydra_cfg.hydra.job.num for job in jobs] == list(range(4))
    for job, (r, _) in zip(jobs, wanted, strict=True):
        folder = Path(job.hydra_cfg.hydra.runtime.output_dir)
        recorded = json.loads((folder / "record.json").read_text())
        assert f"lora.r={recorded['config']['lora']['r']}" == r
        assert recorded["run_id"] == folder.name
        # What Hydra's sweepers optimise: the objective, validation/nll.
        assert job.return_value == scores(recorded)["validation"]["nll"]["value"]
    starts = [event for event in Witness.seen if event[0] == "start"]
    ends = [event for event in Witness.seen if event[0] == "end"]
    assert len(starts) == len(ends) == 4
    assert sorted(e[1:] for e in starts) == sorted(e[1:3] for e in ends)
    assert all(event[3] == "COMPLETED" for event in ends)
    assert Witness.seen[-1] == ("multirun end",)


def test_the_plugin_file_is_thin() -> None:
    """Hydra executes it in every app of the environment."""
    tree = ast.parse(Path(str(plugin.__file__)).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    assert names <= {"collections", "dataclasses", "hydra", "hydra_plugins", "omegaconf"}


APP = """
import sys
import hydra

@hydra.main(version_base="1.3", config_path=None)
def app(cfg):
    assert "torch" not in sys.modules and "lorabench" not in sys.modules
    print("ran", cfg.a, hydra.core.hydra_config.HydraConfig.get().job.num)
    return cfg.a

app()
"""


def test_any_other_hydra_app_runs_under_it_without_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "app.py").write_text(APP)
    done = subprocess.run(
        [sys.executable, "app.py", "-m", "hydra/launcher=packed", "+a=3,1,2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran")]
    assert ran == ["ran 3 0", "ran 1 1", "ran 2 2"]
