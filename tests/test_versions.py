"""What the installed packages are, and what is refused where they are too old."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from conftest import composed

from lorabench import cli, plan, versions
from lorabench.config import ConfigErrors
from lorabench.model import kernels

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture
def with_installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the version lookup answer otherwise for some packages."""

    def pretend(**found: str | None) -> None:
        real = versions.installed
        answers = {name.replace("_", "-"): version for name, version in found.items()}
        monkeypatch.setattr(
            versions, "installed", lambda p: answers[p] if p in answers else real(p)
        )

    return pretend


def declared(package: str) -> str:
    """The least version that pyproject.toml allows."""
    found = re.findall(rf'"{package}>=([\d.]+)', PYPROJECT.read_text())
    return found[0] if found else "(not declared)"


@pytest.mark.slow
def test_a_plan_names_the_three_versions(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {name: metadata.version(name) for name in ("peft", "transformers", "torch")}
    assert cli.main(["plan", "tracker=none"]) == 0
    text = "versions  " + ", ".join(f"{name} {version}" for name, version in wanted.items())
    assert text in capsys.readouterr().out
    assert cli.main(["plan", "--json", "tracker=none"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"] == wanted


@pytest.mark.parametrize("package", ["peft", "transformers", "torch"])
def test_a_package_below_the_requirement_is_refused_with_the_least_version(
    package: str, with_installed: Callable[..., None]
) -> None:
    least = declared(package)
    assert plan.check(composed("tracker=none")) == []
    with_installed(**{package: "0.18.1"})
    (line,) = plan.check(composed("tracker=none"))
    assert line.startswith(f"versions: lorabench needs {package}")
    assert f">={least}" in line and "0.18.1 is installed" in line
    with_installed(**{package: least + "+cpu"})  # a build's own mark is no older version
    assert plan.check(composed("tracker=none")) == []


@pytest.mark.parametrize(
    ("override", "package", "have", "holds"),
    [
        ("model.attn_implementation=flash_attention_2", "flash_attn", None,
         "needs flash-attn>=2.3.3; flash-attn is not installed; pip install 'flash-attn>=2.3.3', "
         "or use model.attn_implementation=sdpa"),
        ("model.attn_implementation=flash_attention_2", "flash_attn", "2.3.2", "2.3.2 is instal"),
        ("model.attn_implementation=flash_attention_3", "flash_attn_3", None,
         "needs flash-attn-3>=3.0.0b1; flash-attn-3 is not installed"),
        ("tracker=wandb", "wandb", "0.15.0", "needs wandb>={least}; 0.15.0 is installed"),
        ("data=alpaca", "datasets", "2.0.0", "needs datasets>={least}; 2.0.0 is installed"),
    ],
)  # fmt: skip
def test_an_option_that_needs_a_newer_package_is_refused(
    override: str, package: str, have: str, holds: str, with_installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "_may_be_cuda", lambda device: True)
    with_installed(**{package: have})
    base = [] if override.startswith("tracker") else ["tracker=none"]
    base += ["trainer.dtype=bfloat16", "trainer.deterministic=false"]  # as flash attention needs
    (line,) = plan.check(composed(*base, override))
    assert holds.format(least=declared(package)) in line
    assert re.match(
        r"(model\.attn_implementation|lora\.bias|tracker\.kind|data\.source): \w+ needs ", line
    )
    with_installed(**{package: "99.0"})
    assert plan.check(composed(*base, override)) == []


def test_options_not_asked_for_need_nothing(with_installed: Callable[..., None]) -> None:
    with_installed(wandb=None, datasets=None, flash_attn=None)
    assert plan.check(composed("tracker=none")) == []


def test_routed_experts_need_a_peft_that_loads_them_again(
    tiny_folder: Callable[[str], Path], with_installed: Callable[..., None]
) -> None:
    with_installed(peft="0.19.1")
    words = ["model=local", "tracker=none", "target_modules=attention"]
    assert plan.make(composed(*words, f"model.path={tiny_folder('qwen3')}")).lora_modules
    assert refused([*words, f"model.path={tiny_folder('qwen3_moe')}"]) == (
        "model.path: 'qwen3_moe': routed experts need peft>=0.20; 0.19.1 is installed; "
        "pip install 'peft>=0.20'"
    )


def test_checks_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from lorabench import cli, config, plan\n"
        "(cfg,), *_ = cli.compose(['trainer.device=cpu'])\n"  # auto asks torch beside a GPU
        "assert plan.check(config.typed(cfg)) == []\n"
        "print(*{'torch', 'transformers', 'peft'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- architectures ---------------------------------------------------------------------------


def changed(folder: Path, to: Path, **entries: object) -> list[str]:
    """A copy of a checkpoint with other entries in its config.json."""
    shutil.copytree(folder, to)
    content = json.loads((to / "config.json").read_text()) | entries
    (to / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v}))
    return ["model=local", f"model.path={to}", "tracker=none"]


def refused(words: list[str]) -> str:
    with pytest.raises(ConfigErrors) as errors:
        plan.make(composed(*words))
    (line,) = errors.value.errors
    return line


def test_an_unknown_architecture_names_the_version_that_saved_it(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {"model_type": "gemma9", "transformers_version": "9.1.0"}
    words = changed(tiny_folder("gemma"), tmp_path / "base", **entries)
    capsys.readouterr()  # transformers wrote the base
    assert cli.main(["plan", *words]) == 2
    have = metadata.version("transformers")
    assert capsys.readouterr().err == (
        f"model.path: '{tmp_path / 'base'}' cannot be built: transformers {have} does not know "
        f"model_type 'gemma9'; the checkpoint was saved with 9.1.0; "
        f"pip install -U 'transformers>=9.1.0'\n"
    )


def test_an_architecture_nobody_knows_or_with_code_of_its_own_is_refused(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    words = changed(tiny_folder("llama"), tmp_path / "a", model_type="lama")
    assert "saved with" not in refused(words)  # by the transformers that is installed
    assert "correct model_type in its config.json" in refused(words)
    code = {"AutoConfig": "configuration_mine.MineConfig"}
    words = changed(tiny_folder("llama"), tmp_path / "b", model_type="mine", auto_map=code)
    assert "runs no code that a checkpoint brings along" in refused(words)
