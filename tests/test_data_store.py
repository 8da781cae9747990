"""The store gives back what went in, byte-identically from build to build, and crosses forks and pickles."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from images import class_folders, data_params, noise
from pipestill.data.sources import open_source
from pipestill.data.store import Dataset, Layout, environment, export_dmd2, open_dataset, pixel_std, write_lmdb
from pipestill.errors import InputError, SurroundingsError
from pipestill.stages.dataset import build


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Twenty 8x8 images in two classes, three to a value."""
    class_folders(tmp_path / "photos", each=10)
    build(data_params(tmp_path / "photos", images_per_value=3), tmp_path / "dataset")
    return open_dataset(tmp_path / "dataset")


def test_images_come_back_in_any_order(dataset: Dataset) -> None:
    images = noise(20, 8, 3)
    assert len(dataset) == 20
    assert (dataset.images(range(20)) == images).all()
    some = [19, 0, 7, 7, 8, 3]
    assert (dataset.images(some) == images[some]).all()
    assert dataset.images([]).shape == (0, 8, 8, 3)
    assert dataset.labels.tolist() == [0] * 10 + [1] * 10
    assert dataset.classes == ("a", "b")
    assert dataset.names[10] == "b/0010.png"
    for index in (-1, 20):
        with pytest.raises(IndexError):
            dataset.images([index])


def test_the_standard_deviation_is_that_of_the_train_images_in_minus_one_to_one(dataset: Dataset) -> None:
    """noise() is even over 0 to 255; validation and test images count for nothing."""
    train = dataset.images(dataset.split["train"]).astype(np.float64) / 127.5 - 1
    assert dataset.pixel_std == pytest.approx(train.std(), abs=1e-6)
    assert dataset.pixel_std == dataset.artifact.manifest.summary["pixel_std"]
    every = dataset.images(range(20)).astype(np.float64) / 127.5 - 1
    assert abs(dataset.pixel_std - every.std()) > 1e-4


@pytest.mark.parametrize(
    ("counts", "expected"), [({7: 5}, 0.0), ({0: 3, 255: 3}, 1.0), ({0: 1, 51: 1}, 0.2), ({}, 0.0)]
)
def test_pixel_std_of_counts(counts: dict[int, int], expected: float) -> None:
    assert pixel_std(np.array([counts.get(value, 0) for value in range(256)])) == expected


def test_split_holds_every_image_once(dataset: Dataset) -> None:
    assert sorted(np.concatenate(list(dataset.split.values())).tolist()) == list(range(20))
    assert [len(dataset.split[part]) for part in ("train", "validation", "test")] == [11, 3, 6]


def test_digests_are_those_of_the_stored_bytes(dataset: Dataset) -> None:
    import hashlib

    for digest, image in zip(dataset.digests, dataset.images(range(20)), strict=True):
        assert digest.tobytes() == hashlib.sha256(image.tobytes()).digest()


def _sum(dataset: Dataset, answers: Any) -> None:
    answers.put(int(dataset.images(range(20)).sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_what_this_one_has_open(dataset: Dataset, method: str) -> None:
    wanted = int(dataset.images(range(20)).sum())
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=_sum, args=(dataset, answers))
    process.start()
    assert answers.get(timeout=60) == wanted
    process.join()
    assert int(dataset.images(range(20)).sum()) == wanted


def test_a_pickle_holds_no_environment(dataset: Dataset) -> None:
    dataset.images([0])
    assert (pickle.loads(pickle.dumps(dataset)).images([4]) == dataset.images([4])).all()


def test_a_rebuilt_file_is_read_anew(tmp_path: Path) -> None:
    for number in (1, 2):
        write_lmdb(tmp_path / "new", [(b"k", bytes([number]))], values=1, value_bytes=1)
        (tmp_path / "new").replace(tmp_path / "x.lmdb")
        with environment(tmp_path / "x.lmdb").begin() as transaction:
            assert transaction.get(b"k") == bytes([number])


def test_equal_content_gives_equal_bytes_over_many_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipestill.data.store.COMMIT_BYTES", 1 << 16)
    blocks = noise(300, 32, 3)
    for name in ("one", "two"):
        clutter = [np.random.default_rng(index).bytes(1 << 18) for index in range(20)]  # other memory to reuse
        del clutter
        pairs = ((b"%010d" % index, block.tobytes()) for index, block in enumerate(blocks))
        write_lmdb(tmp_path / name, pairs, values=300, value_bytes=32 * 32 * 3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with environment(tmp_path / "one").begin() as transaction:
        assert transaction.get(b"%010d" % 299) == blocks[299].tobytes()


def test_writing_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipestill.data.store.COMMIT_BYTES", 10)
    monkeypatch.setattr("pipestill.progress.LINE_EVERY", 0.0)
    write_lmdb(tmp_path / "x", ((b"%010d" % index, b"x") for index in range(25)), values=25, value_bytes=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [f"store: {n}/25" for n in (10, 20, 25, 25)]


def test_the_map_is_large_enough_for_any_layout(tmp_path: Path) -> None:
    for values, value_bytes in ((1, 1), (5000, 1), (3, 5_000_000), (700, 4096 - 16), (700, 4096 - 15)):
        pairs = ((b"%010d" % index, bytes(value_bytes)) for index in range(values))
        write_lmdb(tmp_path / "x", pairs, values=values, value_bytes=value_bytes)
        assert environment(tmp_path / "x").stat()["entries"] == values
        (tmp_path / "x").unlink()


def test_values_beyond_lmdb_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"too large: lower data\.images_per_value"):
        write_lmdb(tmp_path / "x", [], values=1, value_bytes=85 * 4096 * 4096 * 3)


def test_a_store_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match=r"none/x could not be written: No such file or directory"):
        write_lmdb(tmp_path / "none" / "x", [], values=1, value_bytes=1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: cut(path / "images.lmdb"), r"images\.lmdb has \d+ bytes, \d+ were written: rebuild"),
        (lambda path: (path / "labels.npy").unlink(), "is missing"),
        (lambda path: (path / "manifest.json").unlink(), "is no artefact"),
        (lambda path: (path / "index.json").write_bytes(b"[" * (path / "index.json").stat().st_size), "cannot be read"),
        (lambda path: shutil.rmtree(path), "does not exist"),
    ],
)
def test_a_damaged_dataset_is_named_in_one_line(dataset: Dataset, damage: Any, words: str) -> None:
    damage(dataset.artifact.path)
    with pytest.raises(InputError, match=words) as caught:
        open_dataset(dataset.artifact.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["train", None])
def test_export_reads_back_as_a_source(dataset: Dataset, tmp_path: Path, part: str | None) -> None:
    indices: NDArray[np.int64] = np.arange(20) if part is None else dataset.split[part]
    export_dmd2(dataset, indices, tmp_path / "out" / "x.lmdb")
    source = open_source(data_params(tmp_path / "out" / "x.lmdb", format="lmdb"))
    assert source.labels.tolist() == dataset.labels[indices].tolist()
    read = np.stack([np.asarray(source.read(index)) for index in range(len(indices))])
    assert (read == dataset.images(indices)).all()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["x.lmdb"]


def test_layout_counts_values() -> None:
    assert Layout(20, 8, 3, 3).values == 7
    assert Layout(21, 8, 3, 3).values == 7
