"""Each source lists the same images in the same order, with the labels that belong to them."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from images import class_folders, data_params, encoded, noise
from pipestill.data.identity import input_of
from pipestill.data.source import Source
from pipestill.data.sources import open_source
from pipestill.data.transforms import BadImage
from pipestill.errors import InputError, SurroundingsError

LABELS = [0, 2, 1, 0]


def opened(path: Path, **changes: Any) -> Source:
    return open_source(data_params(path, **changes))


def test_folder_lists_classes_and_names_in_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.png", "a/deep/x.png", "a/.hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = opened(tmp_path)
    assert list(source.names) == ["a/deep/x.png", "b/10.png", "b/2.png"]
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [0, 1, 1]
    assert source.read(1) == b"b/10.png"
    assert source.parts is None


def test_folders_named_by_numbers_are_classes_in_the_order_of_these(tmp_path: Path) -> None:
    for name in ("10", "2", "0", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    source = opened(tmp_path)
    assert source.classes == ("0", "1", "2", "10")
    assert list(source.names) == ["0/x.png", "1/x.png", "10/x.png", "2/x.png"]
    assert source.labels.tolist() == [0, 1, 3, 2]
    (tmp_path / "10").rename(tmp_path / "10b")
    assert opened(tmp_path).classes == ("0", "1", "10b", "2")


def test_folder_split_takes_parts_from_the_top_level(tmp_path: Path) -> None:
    for part in ("train", "test"):
        class_folders(tmp_path / part, each=2)
    source = opened(tmp_path, split={"by": "folder"})
    assert source.names[0] == "test/a/0000.png"
    assert source.parts is not None
    assert source.parts.tolist() == [2] * 4 + [0] * 4
    assert source.labels.tolist() == [0, 0, 1, 1] * 2


def test_folder_without_labels_takes_every_file(tmp_path: Path) -> None:
    class_folders(tmp_path, each=1)
    (tmp_path / "c.png").write_bytes(b"")
    source = opened(tmp_path, labels=False)
    assert list(source.names) == ["a/0000.png", "b/0001.png", "c.png"]
    assert source.classes == ()
    assert source.labels.tolist() == [-1, -1, -1]


@pytest.fixture(params=["folder", "zip"])
def edm(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Four images in EDM's form."""
    folder = tmp_path / "edm"
    (folder / "00000").mkdir(parents=True)
    names = [f"00000/img{index:08d}.png" for index in range(4)]
    for name, image in zip(names, noise(4, 8, 3), strict=True):
        (folder / name).write_bytes(encoded(image))
    labels = [[name, label] for name, label in zip(names, LABELS, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    if request.param == "folder":
        return folder
    path = tmp_path / "edm.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ["dataset.json", *names]:
            archive.write(folder / name, name)
    return path


def test_edm_reads_folder_and_zip(edm: Path) -> None:
    source = opened(edm, format="edm")
    assert source.labels.tolist() == LABELS
    assert source.classes == ("0", "1", "2")
    assert [source.read(index) for index in range(4)] == [encoded(image) for image in noise(4, 8, 3)]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "no labels: set data.labels=false"),
        ([["00000/img00000000.png", 0]], "no label for 00000/img00000001.png"),
        ([[f"00000/img{i:08d}.png", [0.0, 1.0]] for i in range(4)], "is no class number"),
        ([[f"00000/img{i:08d}.png", -1] for i in range(4)], "label -1 is no class number"),
        ("nonsense", "cannot be read as EDM's labels"),
        ([[3, 0]], "labels 3, which is no file's name"),
        ([["00000/img00000000.png", 0, 1]], "is not \\[name, number\\]"),
        ([["00000/\ud800.png", 0]], r"labels '00000/\\ud800\.png', which is no file's name"),
        (
            [["00000/img00000000.png", 0], ["00000/img00000000.png", 1]],
            "labels 00000/img00000000.png twice, as 0 and as 1",
        ),
    ],
)
def test_edm_labels_that_do_not_fit(tmp_path: Path, labels: Any, words: str) -> None:
    (tmp_path / "00000").mkdir()
    for index in range(4):
        (tmp_path / f"00000/img{index:08d}.png").write_bytes(b"")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(InputError, match=words):
        opened(tmp_path, format="edm")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "dataset.json cannot be read as EDM's labels"),
        (b'{"labels": [', "dataset.json cannot be read as EDM's labels"),
        (b"[" * 100_000, "dataset.json cannot be read as EDM's labels"),
        (b"[]", "dataset.json cannot be read as EDM's labels"),
        (b"{}", "dataset.json has no 'labels'"),
        (b'{"labels": [], "labels": null}', "'labels' stands there twice"),
        (b'{"labels": {"x.png": 0, "x.png": 1}}', "'x.png' stands there twice"),
    ],
)
def test_edm_labels_that_cannot_be_read(edm: Path, content: bytes, words: str) -> None:
    if edm.is_dir():
        (edm / "dataset.json").write_bytes(content)
    else:
        with zipfile.ZipFile(edm, "w") as archive:
            archive.writestr("dataset.json", content)
    with pytest.raises(InputError) as caught:
        opened(edm, format="edm")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def _damaged(content: bytes, name: bytes) -> bytes:
    """A zip whose member's stored bytes differ from their checksum."""
    at = content.index(name) + len(name) + 4
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def _not_utf8(content: bytes, name: bytes) -> bytes:
    """A zip that says its names are UTF-8, one of which is not."""
    content = content.replace(b"PK\x03\x04\x14\0\0\0", b"PK\x03\x04\x14\0\0\x08")
    content = content.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\0\x08")
    return content.replace(name, b"\xff" + name[1:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: _damaged(content, b"dataset.json"), "dataset.json cannot be read from the zip (Bad CRC-32"),
        (lambda content: _not_utf8(content, b"dataset.json"), "is no zip that can be read ('utf-8' codec"),
        (lambda content: content[: len(content) // 2], "is no zip that can be read"),
        (lambda content: b"", "is no zip that can be read"),
        (lambda content: content.replace(b"img00000001", b"img00000000"), "holds 00000/img00000000.png twice"),
    ],
)
def test_edm_zips_that_cannot_be_read(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "edm.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": [["00000/img00000000.png", 0]]}))
        for index in range(2):
            archive.writestr(f"00000/img{index:08d}.png", encoded(noise(1, 8, 3)[0]))
    content = path.read_bytes()
    path.write_bytes(change(content))
    with pytest.raises(InputError) as caught:
        opened(path, format="edm")
    assert words in str(caught.value)


def test_edm_members_that_cannot_be_read_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "edm.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a.png", "b.png"):
            archive.writestr(name, encoded(noise(1, 8, 3)[0]))
        archive.writestr("dataset.json", json.dumps({"labels": [["a.png", 0], ["b.png", 1]]}))
    path.write_bytes(_damaged(path.read_bytes(), b"a.png"))
    source = opened(path, format="edm")
    with pytest.raises(BadImage, match="cannot be read from the zip"):
        source.read(0)
    assert source.read(1) == encoded(noise(1, 8, 3)[0])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["x.lmdb", "data.mdb", "x.npz", "some.npz", "dataset.json", "names.txt"])
def test_named_pipes_are_refused_in_every_format(tmp_path: Path, name: str) -> None:
    """Whatever opened one would wait for a writer for ever."""
    pixels = tmp_path / "images.npz"
    np.savez(pixels, images=noise(2, 8, 3), labels=np.arange(2))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").touch()
    os.mkfifo(folder / name)
    form = {"x.lmdb": "lmdb", "data.mdb": "lmdb", "dataset.json": "edm"}.get(name, "npz")
    path = {"some.npz": folder, "data.mdb": folder, "dataset.json": folder, "names.txt": pixels}.get(
        name, folder / name
    )
    changes = {"class_names": str(folder / name)} if name == "names.txt" else {}
    with pytest.raises(InputError, match="is a named pipe"):
        opened(path, format=form, **changes)


def test_edm_labels_of_files_that_are_not_there(edm: Path) -> None:
    """They are images of the source that cannot be read; nothing outside the source is one."""
    beyond = edm.parent / "beyond.png"
    beyond.write_bytes(b"")
    labels = [[f"00000/img{index:08d}.png", label] for index, label in enumerate(LABELS)]
    labels += [["00000/gone.png", 3], ["../beyond.png", 0]]
    if edm.is_dir():
        (edm / "dataset.json").write_text(json.dumps({"labels": labels}))
    else:
        with zipfile.ZipFile(edm) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(edm, "w") as archive:
            for name, content in (contents | {"dataset.json": json.dumps({"labels": labels})}).items():
                archive.writestr(name, content)
    source = opened(edm, format="edm")
    assert list(source.names[:2]) == ["../beyond.png", "00000/gone.png"]
    assert source.labels.tolist() == [0, 3, *LABELS]
    assert source.classes == ("0", "1", "2", "3")
    for index in (0, 1):
        with pytest.raises(BadImage, match=r"is named in dataset\.json but missing"):
            source.read(index)
    assert [source.read(index) for index in range(2, 6)] == [encoded(image) for image in noise(4, 8, 3)]
    assert len(opened(edm, format="edm", labels=False).names) == 4


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("arr_0", "arr_1"), ("data", "label")])
def test_npz_under_each_name(tmp_path: Path, save: Any, images: str, labels: str) -> None:
    pixels = noise(4, 8, 3)
    save(tmp_path / "x.npz", **{images: pixels, labels: np.array(LABELS)})
    source = opened(tmp_path / "x.npz", format="npz")
    assert source.labels.tolist() == LABELS
    assert (np.stack([source.read(index) for index in range(4)]) == pixels).all()


def test_npz_flat_rows_of_several_files_are_channel_by_channel(tmp_path: Path) -> None:
    pixels = noise(6, 8, 3)
    rows = pixels.transpose(0, 3, 1, 2).reshape(6, -1)
    for number, some in enumerate((slice(0, 4), slice(4, 6)), start=1):
        np.savez(tmp_path / f"train_data_batch_{number}.npz", data=rows[some], labels=[1, 3, 2, 1, 2, 3][some])
    source = opened(tmp_path, format="npz")
    assert (np.stack([source.read(index) for index in range(6)]) == pixels).all()
    assert source.classes == ("1", "2", "3")  # numbered from 1 there, stored from 0
    assert source.labels.tolist() == [0, 2, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((4, 8, 8, 3))}, "as uint8"),
        ({"pictures": noise(4, 8, 3)}, "holds no images"),
        ({"images": noise(4, 8, 3)}, "holds no labels"),
        ({"images": noise(4, 8, 3), "labels": np.arange(3)}, "3 labels for 4 images"),
        ({"images": noise(4, 8, 4), "labels": np.arange(4)}, r"shape \[4, 8, 8, 4\]"),
        ({"images": noise(4, 8, 3), "labels": np.array([0, 1, 2, "x"], dtype=object)}, "no npz that can be read"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=words):
        opened(tmp_path / "x.npz", format="npz")


def test_npz_that_is_truncated(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=noise(4, 8, 3), labels=np.arange(4))
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"x\.npz is no npz that can be read"):
        opened(tmp_path / "x.npz", format="npz")


def dmd2(path: Path, *, column: bool = False, subdir: bool = False, **changes: bytes | None) -> Path:
    """An LMDB as DMD2's own script writes it; `changes` replace or remove keys."""
    pixels = noise(4, 8, 3)
    pairs: dict[str, bytes | None] = {
        "images_shape": b"4 3 8 8",
        "labels_shape": b"4 1" if column else b"4",
        **{f"images_{i}_data": pixels[i].transpose(2, 0, 1).tobytes() for i in range(4)},
        **{f"labels_{i}_data": np.int64(LABELS[i]).tobytes() for i in range(4)},
    }
    with lmdb.open(str(path), subdir=subdir, map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for key, value in (pairs | changes).items():
            if value is not None:
                transaction.put(key.encode(), value)
    return path


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("subdir", [False, True])
def test_lmdb_in_dmd2_layout(tmp_path: Path, column: bool, subdir: bool) -> None:
    source = opened(dmd2(tmp_path / "x.lmdb", column=column, subdir=subdir), format="lmdb")
    assert source.labels.tolist() == LABELS
    assert (np.stack([source.read(index) for index in range(4)]) == noise(4, 8, 3)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images_shape": None}, "has no 'images_shape'"),
        ({"images_shape": b"4 8 8 3"}, r"\[N, 1 or 3, H, W\] is taken"),
        ({"images_shape": b"\x00\xff"}, "is no shape"),
        ({"images_3_data": None}, "has no 'images_3_data'"),
        ({"images_0_data": b"short"}, "has 5 bytes, 192 belong to it"),
        ({"labels_shape": b"4 10"}, "'labels_shape' is"),
        ({"labels_2_data": None}, "one int64 label for each"),
    ],
)
def test_lmdb_of_another_schema(tmp_path: Path, changes: dict[str, bytes | None], words: str) -> None:
    with pytest.raises(InputError, match=words):
        opened(dmd2(tmp_path / "x.lmdb", **changes), format="lmdb")


def test_lmdb_that_is_truncated_or_none(tmp_path: Path) -> None:
    path = dmd2(tmp_path / "x.lmdb")
    content = path.read_bytes()
    (tmp_path / "half.lmdb").write_bytes(content[: 4096 * 2])
    with pytest.raises(InputError, match=r"half\.lmdb is truncated \(8192 bytes of \d+\)"):
        opened(tmp_path / "half.lmdb", format="lmdb")
    (tmp_path / "text.lmdb").write_text("no LMDB " * 4096)
    with pytest.raises(InputError, match=r"text\.lmdb is no LMDB that can be read"):
        opened(tmp_path / "text.lmdb", format="lmdb")
    with pytest.raises(InputError, match="does not exist"):
        opened(tmp_path / "none.lmdb", format="lmdb")


@pytest.mark.parametrize(("link", "split"), [("a/all", "fraction"), ("b", "fraction"), ("train/b", "folder")])
def test_a_folder_that_links_to_one_above_it_is_no_second_copy(tmp_path: Path, link: str, split: str) -> None:
    class_folders(tmp_path / ("train" if split == "folder" else ""), classes=1)
    (tmp_path / link).symlink_to(tmp_path)
    if link == "a/all":
        names = [f"a/{index:04d}.png" for index in range(6)]
        assert list(opened(tmp_path, labels=False).names) == names
        return
    with pytest.raises(InputError, match=r"b is a class folder without images .* a folder that contains it\)"):
        opened(tmp_path, split={"by": split})
    assert len(opened(tmp_path, labels=False, split={"by": split}).names) == 6


@pytest.mark.parametrize("name", ["x.npz", "x.zip", "folder/dataset.json", "folder/data.mdb", "names.txt"])
def test_a_machine_that_cannot_read_is_not_the_files_fault(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share that is gone says nothing about the file: the exit code is 3, and no copy is asked for."""
    pixels, stale = tmp_path / "pixels.npz", tmp_path / name
    np.savez(pixels, images=noise(2, 8, 3), labels=np.arange(2))
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b"")

    def gone(function: Any) -> Any:
        def call(path: Any, *words: Any, **options: Any) -> Any:
            if str(path) == str(stale):
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return function(path, *words, **options)

        return call

    path = {"folder": stale.parent, "names.txt": pixels}.get(name.partition("/")[0], stale)
    if name == "folder/data.mdb":
        monkeypatch.setattr(Path, "stat", gone(Path.stat))
    monkeypatch.setattr(os, "open", gone(os.open))
    form = {"x.npz": "npz", "folder/data.mdb": "lmdb", "names.txt": "npz"}.get(name, "edm")
    changes = {"class_names": str(stale)} if name == "names.txt" else {}
    with pytest.raises(SurroundingsError, match=r"could not be read \(Stale file handle\): try again"):
        opened(path, format=form, **changes)


def test_one_class_only(tmp_path: Path) -> None:
    class_folders(tmp_path, classes=1)
    with pytest.raises(InputError, match=r"one class only \('a'\): add others or set data\.labels=false"):
        opened(tmp_path)
    assert len(opened(tmp_path, labels=False).names) == 6


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        opened(tmp_path / "none")
    with pytest.raises(InputError, match="holds no images"):
        opened(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match="holds files but no class folders"):
        opened(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="class folder without images"):
        opened(tmp_path)
    with pytest.raises(InputError, match=r"holds a: data\.split\.by=folder takes train/"):
        opened(tmp_path, split={"by": "folder"})
    with pytest.raises(InputError, match="is not a folder"):
        opened(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"takes data\.format=folder, not npz"):
        opened(tmp_path, format="npz", split={"by": "folder"})


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        ({"images": 11, "classes": 2}, r"holds 12 images, 11 were expected \(data\.expect\)"),
        ({"images": 12, "classes": 3}, r"holds 2 classes, 3 were expected"),
    ],
)
def test_another_number_than_expected_is_refused(tmp_path: Path, expected: dict[str, int], says: str) -> None:
    photos = class_folders(tmp_path / "photos")
    with pytest.raises(InputError, match=says):
        open_source(data_params(photos, expect=expected))
    assert len(open_source(data_params(photos, expect={"images": 12, "classes": 2})).names) == 12


SYNSETS = {"list.txt": "n3\nn1\nn2\n", "map.txt": "n2 3 kit fox\nn3 1 tench\nn1 2 wall clock\n"}


@pytest.mark.parametrize("file", SYNSETS)
def test_numbered_classes_get_their_names_and_the_order_of_these(tmp_path: Path, file: str) -> None:
    """Class 0 is n3, 1 is n1, 2 is n2; sorted by name they are n1, n2, n3."""
    images = noise(6, 8, 3)
    np.savez(tmp_path / "images.npz", images=images, labels=np.array([0, 1, 2, 2, 0, 1]))
    (tmp_path / file).write_text(SYNSETS[file])
    plain = opened(tmp_path / "images.npz", format="npz")
    source = opened(tmp_path / "images.npz", format="npz", class_names=str(tmp_path / file))
    assert source.classes == ("n1", "n2", "n3")
    assert source.labels.tolist() == [2, 0, 1, 1, 2, 0]
    assert (source.read(3) == images[3]).all()
    assert input_of(source, tmp_path / "images.npz") != input_of(plain, tmp_path / "images.npz")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n1\nn2\n", "names 2 classes, the images have labels for 3"),
        ("n1\nn2\nn1\n", "names 'n1' twice"),
        ("n1 1\nn2 2\nn3\n", "line 3 has no number"),
        ("n1 1\nn2 2\nn3 4\n", "not consecutive"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, text: str, says: str) -> None:
    np.savez(tmp_path / "images.npz", images=noise(3, 8, 3), labels=np.arange(3))
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(InputError, match=says):
        opened(tmp_path / "images.npz", format="npz", class_names=str(tmp_path / "names.txt"))
    with pytest.raises(InputError, match="cannot be read"):
        opened(tmp_path / "images.npz", format="npz", class_names="absent.txt")
    with pytest.raises(ValueError, match="formats that number their classes"):
        data_params(tmp_path, class_names="names.txt")
