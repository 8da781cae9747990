"""The package's front door: what it offers, and that opening it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pipestill


@pytest.mark.parametrize("name", pipestill.__all__)
def test_everything_offered_is_there(name: str) -> None:
    assert getattr(pipestill, name) is not None


def test_what_is_not_offered_is_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="pipestill has no distil"):
        pipestill.distil  # noqa: B018


@pytest.mark.parametrize("statement", ["import pipestill", "from pipestill.cli import main; main(['--help'])"])
def test_opening_it_imports_nothing_heavy(statement: str) -> None:
    heavy = ("torch", "diffusers", "numpy", "scipy", "matplotlib", "dvc", "snakemake", "pydantic")
    code = f"try:\n    exec({statement!r})\nexcept SystemExit: pass\nimport sys\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command", ["example", "dataset", "reference", "train", "tune", "distill", "sample", "evaluate", "report"]
)
def test_every_stage_helps_with_two_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pipestill import cli

    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.count(f"  pipestill {command} ") >= 2
    assert "exit codes: 0 done" in text


def test_a_model_is_loaded_without_the_networks_beside_its_own() -> None:
    """Those, with SciPy's statistics, cost each command seconds; whoever wants them still gets them afterwards."""
    code = (
        "import sys\n"
        "from pipestill.networks.model import UNet2DModel\n"
        "print([name for name in ('diffusers.loaders', 'scipy', 'torch._dynamo') if name in sys.modules])\n"
        "import diffusers, diffusers.models.transformers, diffusers.models.unets.unet_1d\n"
        "from diffusers.models.unets import UNet2DConditionModel\n"
        "print(diffusers.UNet2DModel is diffusers.models.unets.UNet2DModel is UNet2DModel)\n"
        "import torch, torch._dynamo\n"
        "print(torch._dynamo is sys.modules['torch._dynamo'], callable(torch.compile(lambda x: x)))\n"
        "print(diffusers.models.transformers.DiTTransformer2DModel is diffusers.DiTTransformer2DModel)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "True", "True True", "True"]
