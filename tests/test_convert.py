"""NVIDIA's pickle through the pipeline's own stages: fetched, converted, sampled, measured, fine-tuned, distilled."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import payload, write_params
from edm_files import TINY, denoised, random_tensors, write_edm_pickle
from pipestill import cli, counter
from pipestill.diffusion.schedules import karras
from pipestill.errors import InputError, nearest
from pipestill.networks import checkpoints
from pipestill.networks.edm_pickle import Network
from pipestill.networks.model import load_model, read_card
from pipestill.sampling.store import open_samples
from workflow_project import Project, make_project

DIGITS = TINY | {"in_channels": 1, "out_channels": 1, "label_dim": 10}  # fits the embedded digits: 8×8, grey
Call = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


def parameters(**changes: Any) -> Path:
    """Parameters with a fetched pickle `edm`, its model, and what changes say."""
    fetched = {"edm": {"files": [{"path": "edm.pkl", "source": "path", "location": "edm.pkl"}]}}
    body = {
        "fetched": fetched,
        "converted": {"edm": {"input": "edm", "file": "edm.pkl"}},
        "sampling.runs": {"edm": {"model": "edm", "sampler": "heun", "steps": 3, "sigmas": "models/edm", "images": 20}},
        "tune": {},
        "reference.floor.counts": [20],
        "operation.device": "cpu",
    }
    return write_params(Path("params.yaml"), **body | changes)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: object) -> tuple[int, str]:
        code = cli.main([str(word) for word in words])
        return code, capsys.readouterr().err

    return run


def prepared(call: Call, digits: Path, layout: dict[str, Any] = DIGITS, **changes: Any) -> dict[str, torch.Tensor]:
    """The pickle fetched and converted; returns its tensors."""
    tensors = random_tensors(layout)
    write_edm_pickle(Path("edm.pkl"), layout, tensors)
    parameters(**changes)
    code, said = call("fetch", "--name", "edm", "--output", "fetched")
    assert code == 0, said
    code, said = call("convert", "--name", "edm", "--input", "fetched", "--dataset", digits, "--output", "edm")
    assert code == 0, said
    return tensors


def test_a_pickle_becomes_a_model_that_samples_as_its_formulas_say(
    tmp_path: Path, digits: Path, digits_reference: Path, call: Call
) -> None:
    tensors = prepared(call, digits, DIGITS | {"augment_dim": 9})
    card = read_card(Path("edm"))[1]
    assert (card.role, card.resolution, card.channels, len(card.classes)) == ("teacher", 8, 1, 10)
    assert not card.unconditional_branch
    assert not Path("edm.ran").exists()
    code, said = call("sample", "--name", "edm", "--model", "edm", "--output", "samples")
    assert code == 0, said
    code, said = call(
        "evaluate", "--name", "edm", "--samples", "samples", "--reference", digits_reference, "--output", "figures"
    )
    assert code == 0, said
    figures = json.loads(Path("figures/metrics.json").read_text())
    assert figures["evaluations"] == 5
    assert figures["fd_classifier"] > 0

    # the same images from EDM's formulas and the tensors of the pickle, Heun's steps written out
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    sigmas = karras(3, 0.002, 80.0, 7.0).double().tolist()
    count = 20
    samples = open_samples(Path("samples"))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(samples.labels), 10).double()
    x = sigmas[0] * counter.normal(0, "latent", torch.arange(count), (1, 8, 8)).double()

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return (x - denoised(exact, DIGITS, x, torch.full((count,), sigma).double(), one_hot)) / sigma

    for here, there in pairwise(sigmas):
        first = slope(x, here)
        euler = x + (there - here) * first
        x = euler if there == 0 else x + (there - here) * 0.5 * (first + slope(euler, there))
    expected = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    made = torch.from_numpy(samples.images(0, count)).permute(0, 3, 1, 2)
    assert (made.int() - expected.int()).abs().max() <= 1


def test_weights_go_back_to_edms_names(digits: Path, call: Call) -> None:
    tensors = prepared(call, digits)
    for name in ("back.safetensors", "back.pt"):
        assert call("convert", "--to-edm", name, "--model", "edm")[0] == 0
        back = load_file(name) if name.endswith("safetensors") else torch.load(name, weights_only=True)
        assert back.keys() == {f"model.{key}" for key in tensors}
        assert all(torch.equal(back[f"model.{key}"], tensor) for key, tensor in tensors.items())


def test_a_one_step_checkpoint_becomes_a_student(digits: Path, call: Call) -> None:
    tensors = random_tensors(DIGITS, 3)
    torch.save({f"feedforward_model.model.{key}": tensor for key, tensor in tensors.items()}, "edm.pkl")
    native = {"steps": 1, "sigma_max": 80.0, "sigma_min": 80.0}
    entry = {"edm": {"input": "edm", "file": "edm.pkl", "network": "feedforward_model", "native": native}}
    run = {"edm": {"model": "edm", "sigmas": "models/edm", "images": 20}}
    parameters(converted=entry, **{"sampling.runs": run})
    assert call("fetch", "--name", "edm", "--output", "fetched")[0] == 0
    code, said = call("convert", "--name", "edm", "--input", "fetched", "--dataset", digits, "--output", "edm")
    assert code == 0, said
    card = read_card(Path("edm"))[1]
    assert card.role == "student"
    assert card.native is not None
    assert (card.native.steps, card.native.sigma_max) == (1, 80.0)
    code, said = call("sample", "--name", "edm", "--model", "edm", "--output", "samples")
    assert code == 0, said
    assert "1 evaluations an image" in said


def test_a_teacher_with_dropped_labels_starts_from_the_converted_one(digits: Path, call: Call) -> None:
    """One update at a rate too small to matter: the copy is the original, with a branch that the original has not."""
    training = {"iterations": 1, "batch": 16, "learning_rate": 1e-9, "label_dropout": 0.5, "validate_every": 0}
    teachers = {"dropped": {"start": "models/edm", "network": None, "training": training}}
    students = {"student": {"teacher": "dropped", "init": "dropped", "steps": 2}}
    prepared(call, digits, teachers=teachers, **{"distillation.students": students})
    code, said = call("train", "--name", "dropped", "--dataset", digits, "--output", "dropped")
    assert (code, "teachers.dropped starts from models/edm: give it as --start DIR" in said) == (2, True)
    code, said = call("train", "--name", "dropped", "--dataset", digits, "--start", "edm", "--output", "dropped")
    assert code == 0, said
    first, second = load_model(Path("edm")), load_model(Path("dropped"))
    assert type(second.unet).__name__ == "EdmUNet2DModel"
    assert second.card.unconditional_branch
    assert second.card.denoiser["sigma_data"] == 0.5  # the model's, not the one measured on digits
    for name, tensor in first.unet.state_dict().items():
        torch.testing.assert_close(second.unet.state_dict()[name], tensor, rtol=0, atol=1e-7)


def test_guidance_without_an_unconditional_branch_is_refused(digits: Path, digits_reference: Path, call: Call) -> None:
    guided = {
        "edm": {"model": "edm", "sampler": "heun", "steps": 3, "sigmas": "models/edm", "images": 20, "guidance": 1.5}
    }
    students = {"student": {"teacher": "edm", "init": "edm", "steps": 2, "label_dropout": 0.1}}
    prepared(call, digits, teachers={}, **{"sampling.runs": guided, "distillation.students": students})
    code, said = call("sample", "--name", "edm", "--model", "edm", "--output", "samples")
    assert code == 2
    assert "unconditional branch" in said
    words = ["--dataset", digits, "--reference", digits_reference, "--teacher", "edm", "--output", "student"]
    code, said = call("distill", "--name", "student", *words)
    assert code == 2
    assert "edm has no unconditional branch" in said


@pytest.mark.parametrize(
    ("layout", "changes", "says"),
    [
        (DIGITS | {"label_dim": 4}, {}, "has classes 4"),
        (DIGITS | {"img_resolution": 16}, {}, "has resolution 16"),
        (DIGITS | {"in_channels": 3, "out_channels": 3}, {}, "has channels 3"),
        (DIGITS, {"network": "net"}, "has no network 'net' (there are: ema)"),
        (DIGITS, {"denoiser": {"sigma_data": 1.0}}, "has sigma_data=0.5: set converted.edm.denoiser.sigma_data"),
    ],
)
def test_what_does_not_fit_is_one_line(
    digits: Path, call: Call, layout: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    write_edm_pickle(Path("edm.pkl"), layout, random_tensors(layout))
    parameters(converted={"edm": {"input": "edm", "file": "edm.pkl"} | changes})
    assert call("fetch", "--name", "edm", "--output", "fetched")[0] == 0
    code, said = call("convert", "--name", "edm", "--input", "fetched", "--dataset", digits, "--output", "edm")
    assert code == 2
    assert says in said.splitlines()[-1]
    assert not Path("edm").exists()


def test_hostile_files_stop_the_stage_and_leave_the_older_model(digits: Path, call: Call) -> None:
    prepared(call, digits)
    before = payload(Path("edm"))
    Path("edm.pkl").write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.")
    assert call("fetch", "--name", "edm", "--output", "fetched")[0] == 0  # which reads nothing in it
    code, said = call("convert", "--name", "edm", "--input", "fetched", "--dataset", digits, "--output", "edm")
    assert code == 2
    assert "names os.system" in said
    assert not Path("ran").exists()
    assert payload(Path("edm")) == before


# --- the pipeline -------------------------------------------------------------------------------------------------

WITH_EDM = (
    "experiment=miniature",
    "fetched.edm.files=[{path: edm.pkl, source: path, location: brought/edm.pkl}]",
    "converted.edm={input: edm, file: edm.pkl}",
    "teachers.dropped={start: models/edm}",
    "distillation.students.guided={teacher: dropped, steps: 2}",
    "sampling.runs.edm={model: edm, sampler: heun, steps: 3, sigmas: models/edm}",
    "sampling.runs.guided-cfg15={model: guided, guidance: 1.5}",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("edm") / "project", *WITH_EDM)
    (project.root / "brought").mkdir()
    write_edm_pickle(project.root / "brought/edm.pkl", DIGITS, random_tensors(DIGITS))
    return project


def test_both_tools_know_the_stages_of_a_fetched_teacher(project: Project) -> None:
    jobs = project.planned()
    assert jobs["fetch@edm"]["inputs"] == set()
    assert jobs["convert@edm"]["inputs"] == {"artifacts/fetched/edm/manifest.json", "artifacts/dataset/manifest.json"}
    assert "artifacts/models/edm/manifest.json" in jobs["train@dropped"]["inputs"]
    assert "artifacts/models/edm/manifest.json" not in jobs["train@teacher"]["inputs"]


def test_snakemake_goes_from_the_pickle_to_the_table(project: Project) -> None:
    wanted = [f"artifacts/evaluations/{run}/manifest.json" for run in ("edm", "guided-cfg15")]
    project.snakemake(*wanted)
    figures = json.loads((project.root / "metrics/guided-cfg15.json").read_text())
    assert (figures["evaluations"], figures["guidance"]) == (4, 1.5)
    assert not (project.root / "brought/edm.ran").exists()
    chain = project.pipestill("trace", "--verify", "metrics/guided-cfg15.json")
    for place in (
        "artifacts/models/guided",
        "artifacts/models/dropped",
        "artifacts/models/edm",
        "artifacts/fetched/edm",
    ):
        assert f" in {place}, " in chain
    assert "edm.pkl: file " in chain


def test_names_in_a_hostile_file_are_a_part_of_one_line() -> None:
    hostile = "Evil\n\x1b[31m" + "x" * 500
    strange = Network(hostile, {hostile: 1}, False, {}, {})
    for check in (
        lambda: checkpoints._require_class(strange, "EDMPrecond", "file"),
        lambda: checkpoints._require_known(strange, set(), "file"),
    ):
        with pytest.raises(InputError) as caught:
            check()
        assert str(caught.value).isprintable()
        assert r"Evil\n\x1b[31mxxx" in str(caught.value)
        assert len(str(caught.value)) < 250


def test_a_message_names_some_of_many() -> None:
    names = [f"class {number}" for number in range(1000)]
    assert nearest("q", names).endswith("class 38, class 39 and 960 more)")


@pytest.mark.parametrize("experiment", ["1step", "10step", "10step_finetune"])
def test_the_imagenet_experiments_are_planned_and_name_what_to_bring(tmp_path: Path, experiment: str) -> None:
    project = make_project(tmp_path / "project", f"experiment=imagenet64_dmd2_{experiment}")
    said = project.snakemake("--dry-run", "--quiet", "host")
    for job in (
        "rule fetch",
        "rule dataset",
        "rule convert",
        "rule distill",
        "rule sample",
        "rule evaluate",
        "rule report",
    ):
        assert job in said
    assert "to be brought: data/imagenet/train, which dataset reads" in said
    files = ["edm/edm-imagenet-64x64-cond-adm.pkl", "evaluation/imagenet-64x64.npz"]
    files += ["evaluation/weights-inception-2015-12-05-6726825d.pth"]
    files += ["one-step/pytorch_model.bin"] * (experiment == "10step_finetune")
    for file in files:
        assert f"to be fetched, or brought where there is no network: inputs/{file} (" in said
    assert "data/imagenet/train" in project.snakemake(code=1)
