"""Exported folders in plain Diffusers: loaded where pipestill cannot be imported, and the same images bit for bit."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipestill
from edm_files import TINY, random_tensors
from pipestill import PixelPipeline, artifacts, counter
from pipestill.artifacts import Manifest, describe_files
from pipestill.bundle import BundleError, bundle, module, unbound
from pipestill.commands.export import export
from pipestill.config import AnyDenoiserParams, EdmParams, FlowParams, OperationParams, RunParams, VpParams
from pipestill.networks import adm
from pipestill.networks.model import ModelCard, NativeSchedule, save_model
from pipestill.reporting.licences import Terms, terms
from pipestill.sampling import standalone
from tiny_models import make_model
from workflow_project import ROOT, Project

CPU = OperationParams(device="cpu")

# Loads folders with Diffusers alone: no import of pipestill, no connection. Each job is a folder, what to run with
# `pipeline`, and where the images go; "" runs the example of the folder's card, from the folder above it.
LOADER = """
import json, os, re, socket, sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pipestill", "pydantic"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuses())

def connect(*arguments):
    raise OSError("no network here")

socket.socket.connect = socket.create_connection = connect
import numpy as np
from diffusers import DiffusionPipeline
for folder, code, place in json.load(open(sys.argv[1])):
    os.chdir(os.path.dirname(folder))
    names = {"DiffusionPipeline": DiffusionPipeline}
    if code:
        pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
        images = eval(code, {"pipeline": pipeline}).images
    else:
        (code,) = re.findall("```python\\n(.*?)```", open(os.path.join(folder, "README.md")).read(), re.DOTALL)
        exec(code, names)
        images = np.stack([np.asarray(image).reshape(*image.size, -1) for image in names["images"]])
    np.save(place, images)
assert not any(name.partition(".")[0] == "pipestill" for name in sys.modules)
"""


def in_plain_diffusers(jobs: list[tuple[Path, str]], place: Path) -> list[np.ndarray]:
    """The images of each job, uint8 [N, H, W, C], from one interpreter."""
    place.mkdir()
    listed = [(str(folder), code, str(place / f"{number}.npy")) for number, (folder, code) in enumerate(jobs)]
    (place / "jobs.json").write_text(json.dumps(listed))
    (place / "load.py").write_text(LOADER)
    environment = {"HF_HOME": str(place / "hf"), "HF_MODULES_CACHE": str(place / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(place / "load.py"), str(place / "jobs.json")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [np.load(target) for _, _, target in listed]


def adm_model(path: Path) -> Path:
    """A converted ADM with random weights, whose norms have other groups than Diffusers gives them."""
    tensors = random_tensors(TINY)
    layout = adm.infer(tensors, "here")
    card = ModelCard("teacher", 8, 3, ("a", "b", "c", "d"), False, EdmParams().plain())
    staging = path.with_name(f".{path.name}.partial")
    staging.mkdir(parents=True)
    save_model(staging, card, adm.build(layout), {"ema": adm.to_diffusers(tensors, layout, "here")})
    return artifacts.publish(staging, path, Manifest("model", "convert", 1, {}, {}, describe_files(staging))).path


@dataclass(frozen=True)
class Case:
    run: dict[str, Any]
    call: str
    native: NativeSchedule | None = None
    denoiser: AnyDenoiserParams | None = None


def student(transition: Any) -> NativeSchedule:
    return NativeSchedule(steps=3, transition=transition, sigma_max=8.0, sigma_min=0.05, rho=7.0)


CASES = {
    "edm-teacher": Case({"sampler": "heun", "steps": 3}, "num_inference_steps=3"),
    "edm-teacher-2m": Case(
        {"sampler": "2m", "steps": 4, "sigma_max": 8.0, "sigma_min": 0.05},
        "sampler='2m', num_inference_steps=4, sigma_max=8.0, sigma_min=0.05",
    ),
    "edm-teacher-churn": Case(
        {"sampler": "heun-churn", "steps": 3, "churn": {"churn": 10.0}},
        "sampler='heun-churn', num_inference_steps=3, churn={'churn': 10.0}",
    ),
    "student-euler": Case({"guidance": 1.5}, "guidance_scale=1.5", student("euler")),
    "student-renoise": Case({}, "", student("renoise")),
    "ddpm-teacher": Case(
        {"sampler": "ddpm", "steps": 5, "spacing": "trailing", "clip": True},
        "sampler='ddpm', num_inference_steps=5, spacing='trailing', clip=True",
        denoiser=VpParams(kind="vp", steps=50),
    ),
    "v-teacher-pure-noise": Case(
        {"sampler": "euler", "steps": 4, "spacing": "trailing", "guidance": 2.0},
        "sampler='euler', num_inference_steps=4, guidance_scale=2.0",
        denoiser=VpParams(kind="vp", prediction="v_prediction", zero_terminal_snr=True, steps=50),
    ),
    "flow-teacher": Case(
        {"sampler": "heun", "steps": 3, "spacing": "trailing"},
        "num_inference_steps=3",
        denoiser=FlowParams(kind="flow"),
    ),
    "converted-adm": Case({"sampler": "heun", "steps": 3}, "num_inference_steps=3"),
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


def test_exported_models_sample_the_same_images_without_pipestill(tmp_path: Path) -> None:
    """By a call of one's own and by the card's example; all in one interpreter, the folders' modules side by side."""
    jobs, wanted = [], []
    for name, case in CASES.items():
        place = tmp_path / "artifacts/models" / name
        if name == "converted-adm":
            adm_model(place)
        else:
            make_model(place, native=case.native, denoiser=case.denoiser)
        run = RunParams(model=name, sigmas=f"models/{name}", images=10, micro_batch=8, seeds=(5,), **case.run)
        samples = tmp_path / "artifacts/samples" / name
        pipestill.sample(run, name=name, model=place, output=samples, operation=CPU)
        images = pipestill.open_samples(samples).images(0, 10)
        export(place, tmp_path / "out" / name, licence="MIT", metrics=[], samples=[samples])
        call = f"num_images=10, generator=5, micro_batch=8, output_type='uint8', {case.call}"
        jobs += [(tmp_path / "out" / name, f"pipeline({call})"), (tmp_path / "out" / name, "")]
        wanted += [images, images[:8]]
    made = in_plain_diffusers(jobs, tmp_path / "loader")
    for (folder, code), found, images in zip(jobs, made, wanted, strict=True):
        assert np.array_equal(found, images), f"{folder.name}, {code or 'the example'}"
    ours = PixelPipeline.from_pretrained(tmp_path / "out/converted-adm")
    call = {"num_inference_steps": 3, "generator": 5, "micro_batch": 8, "output_type": "uint8"}
    assert np.array_equal(ours(num_images=10, **call).images, wanted[-2])


def test_the_card_says_how_to_install_what_the_folder_needs(tmp_path: Path) -> None:
    """One command that names every package, in the versions that this project needs."""
    make_model(tmp_path / "artifacts/models/teacher")
    export(tmp_path / "artifacts/models/teacher", tmp_path / "out", licence="MIT", metrics=[], samples=[])
    (line,) = [line for line in (tmp_path / "out/README.md").read_text().splitlines() if line.startswith("pip ")]
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {name: line.partition(";")[0].strip() for line in stated for name in re.findall(r"^[a-z-]+", line)}
    names = ("torch", "diffusers", "safetensors", "numpy", "pillow")
    assert shlex.split(line) == ["pip", "install", *(wanted[name] for name in names)]


def test_the_example_of_a_trained_model_gives_the_images_that_were_measured(tiny: Project, tmp_path: Path) -> None:
    """Every run of a finished pipeline: its own sampler, steps, guidance and tuned sigma range."""
    project = tiny.copy(tmp_path / "project")
    runs = sorted(path.name for path in (project.root / "artifacts/samples").iterdir() if path.is_dir())
    jobs, wanted = [], []
    for run in runs:
        samples = pipestill.open_samples(project.root / "artifacts/samples" / run)
        model = project.root / "artifacts/models" / samples.index["model"]["name"]
        metrics = project.root / "metrics" / f"{run}.json"
        export(model, tmp_path / "out" / run, licence="MIT", metrics=[metrics], samples=[])
        text = (tmp_path / "out" / run / "README.md").read_text()
        assert f"These are the settings of the run {run}, whose metrics are below" in text
        jobs.append((tmp_path / "out" / run, ""))
        wanted.append(samples.images(0, 8))
    assert any("sigma_max=" in (folder / "README.md").read_text().split("```")[3] for folder, _ in jobs)
    for (folder, _), found, images in zip(jobs, in_plain_diffusers(jobs, tmp_path / "loader"), wanted, strict=True):
        assert np.array_equal(found, images), folder.name


def test_a_tuned_range_that_is_not_here_is_said(tiny: Project, tmp_path: Path) -> None:
    import shutil

    from pipestill.errors import InputError

    project = tiny.copy(tmp_path / "project")
    shutil.rmtree(project.root / "artifacts/tuned")
    tuned = next(
        path.parent
        for path in sorted((project.root / "artifacts/samples").glob("*/manifest.json"))
        if json.loads(path.read_text())["parameters"]["sigmas"].startswith("tuned/")
    )
    model = project.root / "artifacts/models" / pipestill.open_samples(tuned).index["model"]["name"]
    with pytest.raises(InputError, match=r"was sampled in the range of tuned/.*, which is not here: pull it"):
        export(model, tmp_path / "out", licence="MIT", metrics=[], samples=[tuned])
    assert not (tmp_path / "out").exists()


# --- the files that travel -----------------------------------------------------------------------------------------


def test_the_travelling_code_is_the_projects_own() -> None:
    """Random numbers and samplers are those of the modules, text for text, and nothing else is needed."""
    text = standalone.pipeline_source()
    assert unbound(text) == set()
    assert "pipestill" not in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    for place, names in {
        "pipestill.philox": ("philox", "key"),
        "pipestill.counter": ("words", "normal"),
        "pipestill.diffusion.samplers": ("walk", "heun", "dpm_solver_2m", "ancestral"),
        "pipestill.diffusion.schedules": ("karras",),
    }.items():
        own = module(place)
        for name in names:
            node = own.definitions[name]
            lines = own.source.splitlines()[node.lineno - 1 : node.end_lineno]
            assert "\n".join(lines) in text, f"{place}.{name}"


def test_the_travelling_random_numbers_and_networks_are_the_projects_own(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "travelling"}
    module_ = type(sys)("travelling")
    sys.modules["travelling"] = module_
    try:
        exec(compile(standalone.pipeline_source(), "pipeline.py", "exec"), module_.__dict__)
        names = module_.__dict__
        items = torch.tensor([0, 1, 2**40])
        assert torch.equal(names["words"](7, "latent", items, 9, draw=2), counter.words(7, "latent", items, 9, draw=2))
        assert torch.equal(names["normal"](7, "step", items, (3, 4)), counter.normal(7, "step", items, (3, 4)))
        with pytest.raises(ValueError, match="sampler=native has noise levels of its own"):
            names["RunParams"](model="m", sigmas="models/m", spacing="trailing")
        with pytest.raises(ValueError, match="sampler=ddim: one of native"):
            names["RunParams"](model="m", sigmas="models/m", sampler="ddim", steps=3)
        for name, value in (("steps", -1), ("guidance", -0.5), ("rho", 0), ("sigma_max", 2e6)):
            with pytest.raises(ValueError, match=f"{name}={value}: a number [<>]=? .* was expected"):
                names["RunParams"](**{"model": "m", "sigmas": "models/m", name: value})
        for kind, given in (("EdmParams", {"p_std": 1, "sigma_max": -1}), ("ChurnParams", {"chrun": 1.0})):
            with pytest.raises(names["InputError"], match=r"^here: .*(sigma_max=-1|chrun)"):
                names["check_section"](names[kind], given, "here")
        for kind in (EdmParams, VpParams, FlowParams, RunParams):
            given = {"kind": "vp"} if kind is VpParams else {"kind": "flow"} if kind is FlowParams else {}
            given |= {"model": "m", "sigmas": "models/m"} if kind is RunParams else {}
            assert vars(names[kind.__name__](**given)) == dict(kind(**given))
    finally:
        del sys.modules["travelling"]


def test_what_cannot_be_put_into_one_file_is_said(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"head": "", "substitutes": {}, "external": {}, "without": {}}
    with pytest.raises(BundleError, match=r"imports pipestill\.networks\.model within a function"):
        bundle([("pipestill.commands.export", "export")], **empty)
    with pytest.raises(BundleError, match=r"pipestill\.philox has no nothing"):
        bundle([("pipestill.philox", "nothing")], **empty)
    with pytest.raises(BundleError, match="several modules define VERSION"):
        bundle([("pipestill.stages.sample", "VERSION"), ("pipestill.stages.train", "VERSION")], **empty)


@pytest.mark.parametrize(
    ("licence", "imposed", "expected"),
    [
        ("Apache-2.0", [], Terms("apache-2.0")),
        ("apache 2.0", [], Terms("apache-2.0")),
        ("GPL-3.0-or-later", [], Terms("gpl-3.0")),
        ("CC-BY-NC-SA-4.0", ["cc-by-nc-sa-4.0"], Terms("cc-by-nc-sa-4.0")),
        ("My Licence, v2", [], Terms("other", "my-licence-v2", "# Licence\nMy Licence, v2\n")),
        (
            "MIT",
            ["CC-BY-4.0"],
            Terms(
                "other",
                "mit",
                "# Licence\nMIT\n\nThe model is made from outside files, whose licences hold for it as well:\n"
                "- CC-BY-4.0\n",
            ),
        ),
        ("许可证", [], Terms("other", "other", "# Licence\n许可证\n")),
    ],
)
def test_licences_have_the_hubs_form(licence: str, imposed: list[str], expected: Terms) -> None:
    assert terms(licence, imposed) == expected
