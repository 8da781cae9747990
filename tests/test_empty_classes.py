"""Labels from 1 on leave a class without images: it keeps its number and is left out of all that is sampled."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest

from commands import here
from images import data_params, encoded, noise
from pipestill import PixelPipeline, artifacts, cli, configure
from pipestill.config import OperationParams, RunParams, TeacherParams
from pipestill.data import order
from pipestill.data.store import open_dataset
from pipestill.evaluation.reference import open_reference
from pipestill.networks.model import read_card
from pipestill.sampling.store import open_samples
from pipestill.stages.dataset import build
from pipestill.stages.sample import labels_of, sample
from pipestill.stages.train import train

SMALL = [
    "experiment=miniature",
    "data.format=npz",
    "data.path=images.npz",
    "sampling.shared.images=12",
    "training.iterations=2",
    "training.validate_every=1",
    "distillation.shared.iterations=1",
    "distillation.shared.validation.every=1",
    "distillation.shared.validation.images=9",
    "distillation.shared.gan.generator_weight=0.001",
    "distillation.shared.gan.discriminator_weight=0.001",
    "tuning.sigma_max=[8.0]",
    "tuning.images=9",
    "reference.classifier.iterations=2",
    "reference.protocol.kid_subset_size=6",
]
COMMANDS = """
dataset --output dataset
reference --dataset dataset --output reference --metrics metrics/floor.json
train --name teacher --dataset dataset --output models/teacher operation.preview.every=2
tune --name teacher --model models/teacher --reference reference --output tuned/teacher
distill --name student-10 --dataset dataset --reference reference --teacher models/teacher --output models/student-10
distill --name student-4 --dataset dataset --reference reference --teacher models/teacher --output models/student-4
sample --name teacher-2m-4 --model models/teacher --sigmas tuned/teacher --output samples/teacher-2m-4
sample --name student-10 --model models/student-10 --output samples/student-10
sample --name student-4 --model models/student-4 --output samples/student-4
evaluate --name teacher-2m-4 --samples samples/teacher-2m-4 --reference reference --output evaluations/teacher-2m-4
evaluate --name student-10 --samples samples/student-10 --reference reference --output evaluations/student-10
evaluate --name student-4 --samples samples/student-4 --reference reference --output evaluations/student-4
report --dataset dataset --reference reference --models models --samples samples --evaluations evaluations \
 --output report
"""


def write_images(path: Path, labels: list[int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 60, (len(labels), 8, 8, 1), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[2 * label :] += 120
    np.savez(path, images=pixels, labels=np.array(labels))


def write_edm(path: Path, pixels: np.ndarray, labels: list[int]) -> None:
    path.mkdir()
    names = [f"img{index:08d}.png" for index in range(len(labels))]
    for name, image in zip(names, pixels, strict=True):
        (path / name).write_bytes(encoded(image))
    (path / "dataset.json").write_text(json.dumps({"labels": [*zip(names, labels, strict=True)]}))


def write_lmdb(path: Path, pixels: np.ndarray, labels: list[int]) -> None:
    count, side, _, channels = pixels.shape
    pairs = {"images_shape": f"{count} {channels} {side} {side}".encode(), "labels_shape": f"{count}".encode()}
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        pairs[f"images_{index}_data"] = image.transpose(2, 0, 1).tobytes()
        pairs[f"labels_{index}_data"] = np.int64(label).tobytes()
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for key, value in pairs.items():
            transaction.put(key.encode(), value)


@pytest.mark.parametrize(("form", "write"), [("edm", write_edm), ("lmdb", write_lmdb)])
def test_labels_of_other_sources_leave_a_class_without_images_and_without_samples(
    form: str, write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels 1 to 3 in dataset.json or in DMD2's LMDB: four classes, of which 0 is neither trained nor sampled."""
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    labels, operation = [1] * 9 + [2] * 6 + [3] * 6, OperationParams(device="cpu")
    write(tmp_path / "images", noise(len(labels), 8, 1), labels)
    source = data_params(tmp_path / "images", format=form, color="grey")
    summary = build(source, tmp_path / "dataset").manifest.summary
    assert (summary["classes"], summary["empty_classes"]) == (4, ["0"])
    opened = open_dataset(tmp_path / "dataset")
    assert (opened.classes, opened.labels.tolist()) == (("0", "1", "2", "3"), labels)

    network = {"channels": [8], "attention": [False], "layers": 1, "norm_groups": 4}
    teacher = TeacherParams.model_validate({"network": network, "training": {"iterations": 1, "batch": 8}})
    train(teacher, name="t", dataset=tmp_path / "dataset", output=tmp_path / "t", operation=operation)
    card = read_card(tmp_path / "t")[1]
    assert (card.empty, card.filled) == (("0",), [1, 2, 3])
    run = RunParams(model="t", sampler="euler", steps=1, sigmas="models/t", images=7)
    sample(run, name="r", model=tmp_path / "t", output=tmp_path / "r", operation=operation)
    assert open_samples(tmp_path / "r").labels.tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_a_class_without_images_is_left_out_of_the_whole_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("images.npz"), [1] * 30 + [2] * 20 + [3] * 10)
    real, balanced_at = [], order.balanced_at
    monkeypatch.setattr(order, "balanced_at", lambda *given, **named: real.append(1) or balanced_at(*given, **named))
    assert cli.main(["config", *SMALL]) == 0
    here("dataset", "--check", "images.npz", runs=tmp_path / "runs")
    assert "60 good images in 4 classes (1 without images: 0)" in capsys.readouterr().err
    for command in COMMANDS.replace("\\\n", "").split("\n"):
        if command:
            here(*shlex.split(command), runs=tmp_path / "runs")

    dataset = artifacts.read(Path("dataset"), "dataset")
    assert dataset.manifest.summary["empty_classes"] == ["0"]
    assert json.loads(dataset.file("report.json").read_text())["empty_classes"] == ["0"]
    for name in ("teacher", "student-10", "student-4"):
        card = read_card(Path("models") / name)[1]
        assert (card.classes, card.empty, card.filled) == (("0", "1", "2", "3"), ("0",), [1, 2, 3])
    for name in ("teacher-2m-4", "student-10", "student-4"):
        assert open_samples(Path("samples") / name).labels.tolist() == [1, 2, 3] * 4
        metrics = json.loads((Path("evaluations") / name / "metrics.json").read_text())
        assert metrics["notes"][0] == "classes without images are left out: 0"
        assert metrics["mix"] == ["balanced"]
    assert real  # the discriminator's real images are in the mix of the student's labels
    reference = open_reference(Path("reference"))
    assert set(reference.guess(reference.features("test", "classifier")).tolist()) <= {1, 2, 3}
    body = json.loads(Path("report/report.json").read_text())
    assert body["grids"]["rows"] == ["1", "2", "3"]
    assert {row["notes"][0] for row in body["runs"]} == {"classes without images are left out: 0"}
    assert "classes without images are left out: 0" in Path("report/index.html").read_text()

    card = read_card(Path("models/student-4"))[1]
    for plan in ("drawn", "data"):
        run = configure.compose(SMALL).sampling.runs["student-4"].model_copy(update={"plan": plan, "images": 60})
        assert set(labels_of(run, card, Path("dataset")).tolist()) == {1, 2, 3}
    pipeline = PixelPipeline.from_pretrained("models/student-4")
    assert pipeline._labels(None, 4, pipeline.card).tolist() == [1, 2, 3, 1]
