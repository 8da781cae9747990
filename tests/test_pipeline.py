"""A model as a Diffusers pipeline: the pictures of `pipestill sample`, what it refuses; and its export with a card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

import pipestill
from pipestill import PixelPipeline, artifacts, cli
from pipestill.commands.export import export
from pipestill.config import OperationParams, RunParams
from pipestill.errors import InputError
from pipestill.networks.model import NativeSchedule
from tiny_models import make_model

STUDENT = NativeSchedule(steps=4, transition="euler", sigma_max=8.0, sigma_min=0.05, rho=7.0)
CPU = OperationParams(device="cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


def loaded(path: Path) -> PixelPipeline:
    pipeline = PixelPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stored(run: RunParams, model: Path) -> np.ndarray:
    """The images that `pipestill sample` stores for a run."""
    pipestill.sample(run, name="run", model=model, output=Path("samples"), operation=CPU)
    samples = pipestill.open_samples(Path("samples"))
    return samples.images(0, samples.count)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("count", [5, 20])
def test_a_students_pictures_are_those_of_pipestill_sample(tmp_path: Path, guidance: float, count: int) -> None:
    model = make_model(tmp_path / "student", native=STUDENT).path
    run = RunParams(model="m", sigmas="models/m", images=count, seeds=(7,), micro_batch=8, guidance=guidance)
    wanted = stored(run, model)
    pipeline = loaded(model)
    generator = torch.Generator().manual_seed(7)
    settings = {"guidance_scale": guidance, "generator": generator, "micro_batch": 8}
    made = pipeline(num_images=count, output_type="uint8", **settings).images
    assert (made == wanted).all()
    assert (pipeline(num_images=count, output_type="uint8", **settings).images == wanted).all()  # nothing is advanced
    pictures = pipeline([index % 3 for index in range(count)], **settings).images
    assert all(
        (np.asarray(picture).reshape(8, 8, 1) == image).all() for picture, image in zip(pictures, wanted, strict=True)
    )
    floats = pipeline(num_images=count, output_type="pt", **settings).images
    assert floats.shape == (count, 1, 8, 8)
    assert ((floats.permute(0, 2, 3, 1).numpy() * 255).round() == wanted).all()
    assert (pipeline(num_images=count, output_type="np", **settings).images == wanted / np.float32(255)).all()


def test_a_teachers_pictures_are_those_of_its_sampler(tmp_path: Path) -> None:
    model = make_model(tmp_path / "teacher").path
    run = RunParams(model="m", sigmas="models/m", sampler="2m", steps=3, images=6, seeds=(1,), micro_batch=8)
    wanted = stored(run, model)
    made = loaded(model)(
        num_images=6, num_inference_steps=3, sampler="2m", generator=1, micro_batch=8, output_type="uint8"
    )
    assert (made.images == wanted).all()


def test_classes_go_by_name_and_index(tmp_path: Path) -> None:
    pipeline = loaded(make_model(tmp_path / "student", native=STUDENT).path)
    by_name = pipeline(list(pipeline.card.classes[:2]), output_type="uint8").images
    assert (by_name == pipeline([0, 1], output_type="uint8").images).all()
    assert isinstance(pipeline(pipeline.card.classes[1]).images[0], Image.Image)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"class_labels": ["nougth"]}, "there is no class 'nougth'; did you mean 'nought'"),
        ({"class_labels": [99]}, "class 99: the model's classes are 0 to"),
        ({"class_labels": [0], "num_inference_steps": 5}, "was distilled for 4 steps"),
        ({"class_labels": [0, 1], "num_images": 3}, "num_images=3, but 2 class labels"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": [1.0]}, "class 1.0: an index or a name"),
        ({"num_images": 0}, "at least 1"),
        ({"num_inference_steps": -1}, "at least 1"),
        ({"guidance_scale": -0.5}, "PixelPipeline: guidance=-0.5"),
        ({"rho": 0.0}, "PixelPipeline: rho=0.0"),
        ({"sampler": "heun", "sigma_max": -1.0}, "PixelPipeline: sigma_max=-1.0"),
        ({"sampler": "heun-churn", "churn": {"chrun": 1.0}}, "churn: chrun is not known; did you mean 'churn'?"),
        ({"sampler": "hein"}, "PixelPipeline: sampler=hein"),
    ],
)
def test_what_it_cannot_do_is_said(tmp_path: Path, arguments: dict[str, object], says: str) -> None:
    pipeline = loaded(make_model(tmp_path / "student", native=STUDENT).path)
    with pytest.raises(InputError, match=re.escape(says)):
        pipeline(**arguments)


def test_what_is_saved_again_can_be_loaded_again(tmp_path: Path) -> None:
    pipeline = loaded(make_model(tmp_path / "student", native=STUDENT).path)
    pipeline.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert (again([0, 1], output_type="uint8").images == pipeline([0, 1], output_type="uint8").images).all()


def test_the_notebooks_lines_run_as_they_stand(tmp_path: Path) -> None:
    model = make_model(tmp_path / "artifacts/models/student-4", native=STUDENT).path
    run = RunParams(model="m", sigmas="models/m", images=100, seeds=(0,))
    wanted = stored(run, model)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/pipeline.md").read_text(), re.DOTALL)[0]
    threads = torch.get_num_threads()
    names: dict[str, object] = {}
    try:
        exec(
            compile(code.replace("[3, 7, 7, 1]", "[2, 1, 1, 0]"), "docs/pipeline.md", "exec"), names
        )  # three classes here
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(names["everything"], wanted)
    assert Image.open("three.png").size == (128, 128)


# --- export -------------------------------------------------------------------------------------------------------


def test_an_exported_model_samples_the_same_and_says_what_it_is(tmp_path: Path) -> None:
    model = make_model(tmp_path / "artifacts/models/student", native=STUDENT).path
    run = RunParams(model="m", sigmas="models/m", images=4)
    wanted = stored(run, model)
    words = ["export", "--model", str(model), "--output", "out", "--licence", "CC-BY-4.0", "--samples", "samples"]
    assert cli.main(words) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        ".pipestill",
        "README.md",
        "model.json",
        "model_index.json",
        "pictures",
        "pipeline.py",
        "unet",
    ]
    assert (loaded(Path("out"))(num_images=4, output_type="uint8").images == wanted).all()
    text = Path("out/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert "license_name" not in front
    assert front["library_name"] == "diffusers"
    assert "A student of 4 steps (euler, sigma 8 to 0.05), distilled by DMD2 for images of 8×8 pixels" in text
    assert artifacts.read(model, "model").manifest.payload in text
    assert "![samples](pictures/samples.png)" in text
    assert Path("out/pictures/samples.png").read_bytes() == Path("samples/grid.png").read_bytes()
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert cli.main(words) == 0  # an earlier export is replaced
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    Path("out/README.md").write_text("mine")
    assert cli.main(words) == 2
    assert Path("out/README.md").read_text() == "mine"


def test_nothing_is_exported_without_a_licence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "artifacts/models/student", native=STUDENT).path
    assert cli.main(["export", "--model", str(model), "--output", "out"]) == 2
    assert "--licence" in capsys.readouterr().err
    assert cli.main(["export", "--model", str(model), "--output", "out", "--licence", " "]) == 2
    assert "not handed over without one" in capsys.readouterr().err
    assert not Path("out").exists()


def test_pictures_of_other_weights_and_of_one_name_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "artifacts/models/student", native=STUDENT).path
    stored(RunParams(model="m", sigmas="models/m", images=4), model)
    with pytest.raises(InputError, match="sampled with the model's ema weights"):
        export(model, Path("out"), licence="x", weights="raw", metrics=[], samples=[Path("samples")])
    with pytest.raises(InputError, match="have the same name"):
        export(model, Path("out"), licence="x", metrics=[], samples=[Path("samples"), Path("samples")])
    with pytest.raises(InputError, match="not one line"):
        export(model, Path("out"), licence='x"\nlicense: mit', metrics=[], samples=[])
    export(model, Path('o"ut'), licence='a "name"', metrics=[], samples=[])
    text = Path('o"ut/README.md').read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "a-name", "LICENSE.md")
    assert Path('o"ut/LICENSE.md').read_text() == '# Licence\na "name"\n'
    compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "card", "exec")
    assert not list(Path().glob(".*partial"))


def test_metrics_and_samples_are_not_taken_for_each_other(tmp_path: Path) -> None:
    model = make_model(tmp_path / "artifacts/models/student", native=STUDENT).path
    stored(RunParams(model="m", sigmas="models/m", images=4), model)
    Path("other.json").write_text("{}")
    for metrics in (Path("samples"), Path("other.json"), Path("gone.json"), model):
        with pytest.raises(InputError, match=metrics.name):
            export(model, Path("out"), licence="x", metrics=[metrics], samples=[])
    for samples in (Path("other.json"), model):
        with pytest.raises(InputError, match=samples.name):
            export(model, Path("out"), licence="x", metrics=[], samples=[samples])
    assert not Path("out").exists()


def test_pictures_of_another_model_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "artifacts/models/student", native=STUDENT).path
    stored(RunParams(model="m", sigmas="models/m", images=4), model)
    other = make_model(tmp_path / "artifacts/models/other", native=NativeSchedule(2, "euler", 8.0, 0.05, 7.0)).path
    with pytest.raises(InputError, match="was not sampled from this model"):
        export(other, Path("out"), licence="x", metrics=[], samples=[Path("samples")])
    assert not Path("out").exists()


@pytest.mark.parametrize("licence", ["CC-BY-NC-SA-4.0 (NVIDIA, EDM)", ""])
def test_licences_of_fetched_files_are_taken_over_or_asked_for(tmp_path: Path, licence: str) -> None:
    """A converted teacher: its chain ends in a fetched file."""
    from edm_files import TINY, random_tensors, write_edm_pickle
    from images import class_folders, data_params
    from pipestill.config import ConvertParams, FetchParams
    from pipestill.data.store import open_dataset
    from pipestill.stages.convert import convert
    from pipestill.stages.dataset import build
    from pipestill.stages.fetch import fetch

    photos = class_folders(tmp_path / "photos")
    build(data_params(photos), Path("artifacts/dataset"))
    classes = len(open_dataset(Path("artifacts/dataset")).classes)
    layout = TINY | {"label_dim": classes}
    write_edm_pickle(tmp_path / "edm.pkl", layout, random_tensors(layout))
    files = [{"path": "edm.pkl", "source": "path", "location": "edm.pkl"}]
    fetch(FetchParams(files=files, licence=licence), Path("artifacts/fetched/edm"), inbox=Path("inputs/edm"))
    params = ConvertParams(input="edm", file="edm.pkl")
    model = Path("artifacts/models/edm")
    convert(params, name="edm", source=Path("artifacts/fetched/edm"), dataset=Path("artifacts/dataset"), output=model)
    if not licence:
        with pytest.raises(InputError, match=r"artifacts/fetched/edm states no licence.*set fetched\.edm\.licence"):
            export(model, Path("out"), licence="x", metrics=[], samples=[])
        return
    export(model, Path("out"), licence="CC-BY-NC-SA-4.0", metrics=[], samples=[])
    text = Path("out/README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "other"  # of which the fetched file's is a part
    assert f"- {licence}\n" in Path("out/LICENSE.md").read_text()
    assert f"- {licence}\n" in text
    files[0]["path"] = "edm.pkl"
    fetch(FetchParams(files=files, licence="Public domain"), Path("artifacts/fetched/aaa"), inbox=Path("inputs/aaa"))
    export(
        model, Path("second"), licence="x", metrics=[], samples=[]
    )  # equal bytes under another licence change nothing
    assert f"- {licence}\n" in Path("second/README.md").read_text()
    assert "It has no unconditional branch: guidance is refused." in text
    assert loaded(Path("out"))([0], num_inference_steps=2).images[0].size == (8, 8)
    shutil.rmtree("artifacts/fetched/edm")
    with pytest.raises(InputError, match="is not here, so its licence is not known"):
        export(model, Path("again"), licence="x", metrics=[], samples=[])


def test_a_folder_that_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no model folder"):
        PixelPipeline.from_pretrained(tmp_path)


def test_the_folder_is_one_that_diffusers_knows(tmp_path: Path) -> None:
    model = make_model(tmp_path / "student", native=STUDENT).path
    index = json.loads((model / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert DiffusionPipeline.load_config(model)["card"]["native"]["steps"] == 4
