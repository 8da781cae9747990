"""The dataset and example stages as a user meets them: artefacts, reports, exit codes, one line for each mistake."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import _base as futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from commands import can_mount
from images import bad_files, class_folders, data_params, encoded, noise
from pipestill import artifacts, cli, work
from pipestill.artifacts import InputEntry
from pipestill.config import ExampleParams
from pipestill.data.examples import ROWS, TEXTURES, patches
from pipestill.data.store import open_dataset
from pipestill.errors import InputError, Stopped
from pipestill.stages.dataset import build, check
from pipestill.stages.example import write_example
from pipestill.stopping import StopRequest
from pipestill.work import open_work

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test works in its own folder; the stage's signal handlers do not outlive it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIPESTILL_RUNS", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `pipestill dataset` on `photos` as it is; returns the exit code and the lines of its error."""
    data = data_params(Path("photos")).plain()
    Path("params.yaml").write_text(yaml.safe_dump({"data": data, "teachers": {"teacher": {}}}))

    def call(*arguments: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = cli.main(["dataset", *arguments])
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if line.startswith("pipestill dataset: ")]

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_build_twice_then_elsewhere(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(Path("photos"))
    assert run("--output", "one") == (0, [])
    first = contents(Path("one"))
    assert cli.main(["dataset", "--output", "one"]) == 0
    assert "one is there and verifies: nothing to do" in capsys.readouterr().err
    assert contents(Path("one")) == first
    assert run("--output", "two", "operation.workers=1") == (0, [])
    assert contents(Path("two")) == first
    manifest = artifacts.read(Path("one"), "dataset").manifest
    assert manifest.summary == {
        "images": 12,
        "classes": 2,
        "parts": {"train": 7, "validation": 1, "test": 4},
        "pixel_std": 0.591254,
        "empty_classes": [],
        "set_aside": {},
    }
    assert manifest.views == ("report.html",)
    assert not list(Path("runs/dataset").glob("*/state"))


def test_a_changed_image_changes_the_artefact(run: Run) -> None:
    class_folders(Path("photos"))
    run("--output", "one")
    before = artifacts.read(Path("one"), "dataset").manifest
    (image,) = noise(1, 8, 3, seed=5)
    Path("photos/a/0000.png").write_bytes(encoded(image))
    assert run("--output", "one") == (0, [])
    after = artifacts.read(Path("one"), "dataset").manifest
    assert before.inputs["images"] != after.inputs["images"]
    assert (open_dataset(Path("one")).images([0])[0] == image).all()


def test_what_was_digested_once_is_remembered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(Path("photos"))
    for file in Path("photos").rglob("*.png"):
        os.utime(file, (0, 0))
    monkeypatch.setattr("pipestill.data.identity.SETTLED", 0)
    run("--output", "one")
    monkeypatch.setattr("pipestill.digests.of_file", lambda path: pytest.fail(f"{path} was read again"))
    monkeypatch.setattr("pipestill.work._finished", lambda work: None)
    with pytest.raises(BaseException, match=r"(one|partial)/.* was read again"):  # the output's own digests alone
        build(data_params(Path("photos")), Path("one"))


@pytest.mark.parametrize("name", bad_files())
def test_one_bad_file_is_refused_or_set_aside(run: Run, name: str) -> None:
    class_folders(Path("photos"))
    assert run("--output", "out") == (0, [])
    before = contents(Path("out"))
    content, words = bad_files()[name]
    Path("photos/a", name).write_bytes(content)
    code, lines = run("--output", "out")
    assert code == 2
    assert len(lines) == 1
    assert f"photos/a/{name} " in lines[0]
    assert words in lines[0]
    assert "data.on_bad=set-aside" in lines[0]
    assert contents(Path("out")) == before

    assert run("--output", "out", "data.on_bad=set-aside") == (0, [])
    dataset = open_dataset(Path("out"))
    assert (dataset.images(range(12)) == noise(12, 8, 3)).all()
    (aside,) = dataset.artifact.manifest.summary["set_aside"].items()
    assert aside[0] == f"a/{name}"
    assert words in aside[1]


def test_several_bad_files_are_listed_and_one_line_ends_the_list(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(Path("photos"))
    Path("photos/readme.txt").write_text("beside the classes")
    Path("photos/a/zero.png").write_bytes(b"")
    Path("photos/b/dead.png").symlink_to("nowhere")
    assert cli.main(["dataset", "--output", "out"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-4].startswith("  a/zero.png is no image in a known format (AVIF, ")  # in the order of their names
    assert lines[-3:-1] == [
        "  b/dead.png cannot be read (No such file or directory)",
        "  readme.txt lies beside the class folders",
    ]
    assert lines[-1].startswith(
        "pipestill dataset: 3 files of photos cannot be used, the first is photos/a/zero.png is"
    )
    page = Path(lines[-1].rpartition("report: ")[2].rstrip(")"))
    assert "lies beside the class folders" in page.read_text()
    assert not Path("out").exists()
    assert run("--output", "out", "data.on_bad=set-aside") == (0, [])
    assert len(artifacts.read(Path("out"), "dataset").manifest.summary["set_aside"]) == 3


def test_a_thousand_equal_complaints_are_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(Path("photos"))
    clear = encoded(np.zeros((8, 8, 4), dtype=np.uint8))
    for index in range(1000):
        Path(f"photos/b/clear-{index:04d}.png").write_bytes(clear)
    fault = (
        "1,000 files: has transparent pixels: set data.background to the colour behind them "
        "(b/clear-0000.png, b/clear-0001.png, b/clear-0002.png, …)"
    )
    code, lines = run("--output", "out")
    assert code == 2
    (only,) = lines
    assert only.startswith(f"pipestill dataset: photos: {fault}: fix or remove them, or set data.on_bad=set-aside")
    for side in range(9, 30):
        (image,) = noise(1, side, 3)
        Path(f"photos/a/side-{side}.png").write_bytes(encoded(image))
    assert cli.main(["dataset", "--check", "photos", "--report", "report"]) == 2
    said = capsys.readouterr().err.splitlines()
    sizes = "21 files: is NxN, and data.transform=none takes 8x8 only (a/side-10.png, a/side-11.png, a/side-12.png, …)"
    assert [words for words in said if words.startswith("  ") and not words.startswith("  note: ")] == [
        f"  {fault}",
        f"  {sizes}",
    ]
    report = json.loads(Path("report/report.json").read_text())
    assert report["bad"]["count"] == len(report["bad"]["files"]) == 1021
    assert report["bad"]["faults"][1] == {
        "reason": "is NxN, and data.transform=none takes 8x8 only",
        "count": 21,
        "examples": ["a/side-10.png", "a/side-11.png", "a/side-12.png", "a/side-13.png", "a/side-14.png"],
    }
    assert "21</td><td>is NxN, and data.transform=none" in Path("report/report.html").read_text()
    good = ["data.background=white", "data.transform=center-crop"]
    assert run("--output", "out", *good) == (0, [])
    dataset = open_dataset(Path("out"))
    assert (dataset.images([dataset.names.index("b/clear-0007.png")]) == 255).all()
    assert json.loads(Path("out/report.json").read_text())["transparent"] == 1000


def test_check_of_bad_files_alone_speaks_of_nothing_else(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        Path("photos", name, "1.png").write_bytes(b"")
    assert cli.main(["dataset", "--check", "photos"]) == 2
    said = capsys.readouterr().err
    assert "2 files: is no image in a known format" in said
    assert "note: " not in said
    assert "the stages that follow" not in said


def test_files_that_edms_labels_name_and_that_are_not_there(run: Run) -> None:
    class_folders(Path("photos"))
    names = sorted(str(file.relative_to("photos")) for file in Path("photos").rglob("*.png"))
    labels = [[name, int(name.startswith("b"))] for name in [*names, "b/gone.png"]]
    Path("photos/dataset.json").write_text(json.dumps({"labels": labels}))
    code, lines = run("--output", "out", "data.format=edm")
    assert code == 2
    (line,) = lines
    assert "photos/b/gone.png is named in dataset.json but missing: fix or remove them" in line
    assert run("--output", "out", "data.format=edm", "data.on_bad=set-aside") == (0, [])
    dataset = open_dataset(Path("out"))
    assert dataset.names == names
    assert (dataset.images(range(12)) == noise(12, 8, 3)).all()
    aside = dataset.artifact.manifest.summary["set_aside"]
    assert aside == {"b/gone.png": "is named in dataset.json but missing"}


# ---- odd directory entries ----


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


ODD: dict[str, tuple[str | bytes, Callable[[Path], Any], str]] = {  # name, how it is made, what is said of it
    "pipe": ("a/pipe.png", os.mkfifo, "a/pipe.png is a named pipe"),
    "socket": ("a/socket.png", _bind, "a/socket.png is a socket"),
    "device": ("a/zero.png", lambda path: path.symlink_to("/dev/zero"), "a/zero.png is a device"),
    "own-link": (
        "a/self.png",
        lambda path: path.symlink_to("self.png"),
        "a/self.png cannot be read (Too many levels of symbolic links)",
    ),
    "loop": ("a/up", lambda path: path.symlink_to(".."), "a/up is a link to a folder that contains it"),
    "two-loops": (
        "b/x/y",
        lambda path: (path.parent.mkdir(), path.symlink_to(path.parent.resolve())),
        "b/x/y is a link to a folder that contains it",
    ),
    "latin-1": (b"a/\xfc.png", Path.touch, r"a/\xfc.png has a name that is not UTF-8"),
    "latin-1-folder": (b"a/\xfc", Path.mkdir, r"a/\xfc has a name that is not UTF-8"),
    "latin-1-class": (b"\xfc", Path.mkdir, r"\xfc has a name that is not UTF-8"),
    "new-line": ("a/1\n2.png", Path.touch, r"a/1\n2.png is no image in a known format"),
    "folder-pipe": ("pipe", os.mkfifo, "pipe is a named pipe"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.timeout(60)
def test_odd_entries_are_bad_files_with_a_reason(run: Run, kind: str) -> None:
    name, make, says = ODD[kind]
    class_folders(Path("photos"))
    make(Path("photos", os.fsdecode(name)))
    code, lines = run("--output", "out")
    assert code == 2
    (line,) = lines
    assert line.startswith(f"pipestill dataset: photos/{says}")
    assert run("--output", "out", "data.on_bad=set-aside") == (0, [])
    dataset = open_dataset(Path("out"))
    assert (dataset.images(range(12)) == noise(12, 8, 3)).all()
    ((aside, reason),) = dataset.artifact.manifest.summary["set_aside"].items()
    assert says in f"{aside} {reason}".replace("\n", r"\n")
    assert run("--output", "out", "data.on_bad=set-aside") == (0, [])  # found again, by the digest of the same source


def test_each_image_is_listed_once_through_links_that_contain_each_other(run: Run) -> None:
    class_folders(Path("photos"))
    Path("photos/a/x").symlink_to("../b")
    Path("photos/b/y").symlink_to("../a")
    assert run("--output", "out", "data.on_bad=set-aside") == (0, [])
    dataset = open_dataset(Path("out"))
    assert sorted(dataset.names) == sorted(
        [f"a/{i:04d}.png" for i in range(6)]
        + [f"a/x/{i:04d}.png" for i in range(6, 12)]
        + [f"b/{i:04d}.png" for i in range(6, 12)]
        + [f"b/y/{i:04d}.png" for i in range(6)]
    )
    assert sorted(dataset.artifact.manifest.summary["set_aside"]) == ["a/x/y", "b/y/x"]


@pytest.mark.parametrize("refusal", [PermissionError(errno.EACCES, ""), FileNotFoundError(errno.ENOENT, "")])
@pytest.mark.parametrize("kind", ["file", "class folder", "folder", "all"])
def test_what_may_not_be_read_or_vanished_is_said(
    run: Run, kind: str, refusal: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions mean nothing to root, so the system's refusal is imitated."""
    number, words = refusal.errno, os.strerror(refusal.errno or 0)
    class_folders(Path("photos"))
    class_folders(Path("photos/b/deep"), classes=1)
    forbidden = {"file": "a/0003.png", "class folder": "a", "folder": "b/deep", "all": "."}[kind]

    def refusing(function: Any) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path) == str(Path("photos", forbidden)):
                raise OSError(number, words, str(path))
            return function(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "open", refusing(os.open))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    code, lines = run("--output", "out")
    assert code == 2
    (line,) = lines
    assert f"cannot be read ({words})" in line
    assert str(Path("photos", forbidden)) in line


def test_files_that_vanish_while_they_are_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipestill.data import sources

    class_folders(Path("photos"))
    plain = sources.open_source

    def then_gone(data: Any) -> Any:
        source = plain(data)
        Path("photos/a/0000.png").unlink(missing_ok=True)
        return source

    monkeypatch.setattr(sources, "open_source", then_gone)
    code, lines = run("--output", "out")
    assert code == 2
    assert "photos/a/0000.png cannot be read (No such file or directory)" in lines[0]
    class_folders(Path("photos"))
    assert run("--output", "out", "data.on_bad=set-aside") == (0, [])
    assert open_dataset(Path("out")).names == [f"{'ab'[i // 6]}/{i:04d}.png" for i in range(1, 12)]


@pytest.mark.parametrize("when", ["digest", "decode"])
def test_a_disk_that_cannot_be_read_is_no_failed_write(run: Run, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipestill import userfiles

    class_folders(Path("photos"))
    plain, seen = userfiles.open_file, 0

    def failing(path: Path) -> Any:
        nonlocal seen
        seen += str(path) == "photos/a/0002.png"
        if str(path) == "photos/a/0002.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path)

    monkeypatch.setattr(
        "pipestill.digests.open_file" if when == "digest" else "pipestill.data.folders.open_file", failing
    )
    code, lines = run("--output", "out")
    assert code == 3
    (line,) = lines
    assert "a/0002.png could not be read (Input/output error)" in line
    assert seen


def test_files_that_are_too_large_are_not_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(Path("photos"))
    with Path("photos/a/0000.png").open("r+b") as file:
        file.truncate((1 << 30) + 1)  # a hole: it takes no room
    monkeypatch.setattr("pipestill.digests.of_file", lambda path: "digest")
    code, lines = run("--check", "photos")
    assert code == 2
    assert lines == []
    assert run("--output", "out", "data.on_bad=set-aside", "operation.workers=1")[0] == 0
    aside = artifacts.read(Path("out"), "dataset").manifest.summary["set_aside"]
    assert aside == {"a/0000.png": "is larger than 1024 MiB, the most that an image may have"}


def test_an_image_that_does_not_fit_into_memory_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipestill.data import ingest

    plain = ingest.prepare

    def starved(content: Any, form: Any, found: Any) -> Any:
        plain(content, form, found)
        raise MemoryError

    class_folders(Path("photos"))
    monkeypatch.setattr(ingest, "prepare", starved)
    code, lines = run("--output", "out")
    assert code == 3
    (line,) = lines
    assert "/0000.png (8x8) does not fit into memory: lower operation.workers, or remove it" in line


# ---- folders that cannot be used ----


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: None, "data.path=photos does not exist"),
        (lambda: os.mkfifo("photos"), "data.path=photos is a named pipe"),
        (lambda: Path("photos").symlink_to("photos"), "photos cannot be read (Too many levels of symbolic links)"),
        (lambda: Path("photos").mkdir(), "data.path=photos holds no images"),
        (lambda: class_folders(Path("photos"), classes=1), "one class only ('a')"),
        (lambda: class_folders(Path("photos/a")), None),  # nested folders belong to their class: one class
        (lambda: class_folders(Path("photos"), side=9), "is 9x9, and data.transform=none takes 8x8 only"),
    ],
)
def test_folders_that_cannot_be_used(run: Run, make: Callable[[], Any], words: str | None) -> None:
    make()
    code, lines = run("--output", "out")
    assert code == 2
    assert len(lines) == 1
    assert (words or "one class only") in lines[0]
    assert not Path("out").exists()


def test_a_class_or_a_part_without_good_images(run: Run) -> None:
    class_folders(Path("photos"))
    for file in Path("photos/a").iterdir():
        file.write_bytes(b"")
    code, lines = run("--output", "out", "data.on_bad=set-aside")
    assert code == 2
    assert "class 'a' has no good image in the train part" in lines[0]
    for file in Path("photos/b").iterdir():
        file.write_bytes(b"")
    code, lines = run("--output", "out", "data.on_bad=set-aside")
    assert code == 2
    assert "no good image is left" in lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.resolution=2", "data.resolution=2"),
        ("data.filtre=box", "did you mean 'filter'?"),
        ("data.on_bad=ignore", "data.on_bad=ignore"),
        ("data.background=red", "data.background: 'red' is not refuse, white, black, or a colour such as '#ff8000'"),
        ("data.background=#12345", "data.background: '#12345' is not refuse, white, black, or a colour"),
        ("data.split.test=0.9", "must leave something to train on"),
    ],
)
def test_parameters_that_do_not_fit(run: Run, override: str, words: str) -> None:
    class_folders(Path("photos"))
    code, lines = run("--output", "out", override)
    assert code == 2
    assert len(lines) == 1
    assert words in lines[0]


def test_an_output_that_another_process_writes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(Path("photos"))
    inputs = {"images": InputEntry("folder", "other")}
    monkeypatch.setattr(work, "DYING", 0.0)
    with open_work(kind="dataset", stage="dataset", version=1, parameters={}, inputs=inputs, output=Path("out")):
        code, lines = run("--output", "out")
    assert code == 3
    assert len(lines) == 1
    assert "out is being written by another process" in lines[0]
    assert run("--output", "out") == (0, [])


def test_an_output_whose_writer_is_dying_is_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(Path("photos"))
    inputs = {"images": InputEntry("folder", "other")}
    dying = open_work(kind="dataset", stage="dataset", version=1, parameters={}, inputs=inputs, output=Path("out"))
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            dying.__exit__(None, None, None)

    dying.__enter__()
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=time.monotonic, sleep=wait))
    assert run("--output", "out") == (0, [])
    assert len(waits) == 3


def test_check_finds_bad_files_and_writes_no_artefact(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(Path("mine"))
    assert cli.main(["dataset", "--check", "mine"]) == 0
    said = capsys.readouterr().err
    for limit in ("train images", "kid_subset_size="):  # all that reference would refuse, at once
        assert re.search(rf"the stages that follow would refuse this: .*{limit}", said), limit
    Path("mine/a/text.png").write_text("no image")
    assert cli.main(["dataset", "--check", "mine", "--report", "report"]) == 2
    assert "a/text.png is no image in a known format" in capsys.readouterr().err
    report = json.loads(Path("report/report.json").read_text())
    (bad,) = report["bad"]["files"]
    assert bad["name"] == "a/text.png"
    assert bad["reason"].startswith("is no image in a known format (AVIF, ")
    assert "<img" in Path("report/report.html").read_text()
    assert [path for path in Path("runs").rglob("*") if path != Path("runs/scratch")] == []


@pytest.mark.parametrize(
    ("override", "says"),
    [("data.labels=false", "there is no classifier to measure with"), ("data.resolution=33", "33 pixels cannot be")],
)
def test_check_names_what_the_parameters_of_other_stages_would_refuse(
    override: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(Path("mine"), each=200, side=33)
    words = ["data.transform=center-crop", "reference.floor.counts=[200]", override]
    assert cli.main(["dataset", "--check", "mine", *words]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "would refuse this" in line]
    assert says in line


def test_report_counts_what_is_there(tmp_path: Path) -> None:
    photos = class_folders(tmp_path / "photos", each=10)
    twin = (photos / "a/0003.png").read_bytes()
    (photos / "b/twin.png").write_bytes(twin)
    (grey,) = noise(1, 16, 1, seed=8)
    (photos / "a/grey.png").write_bytes(encoded(grey))
    (near,) = noise(1, 8, 3, seed=9)
    near = np.sort(near, axis=1)  # brightness grows to the right, so that a step of 1 somewhere changes no bit
    (photos / "b/near-1.png").write_bytes(encoded(near))
    near[0, 0, 0] ^= 1
    (photos / "b/near-2.png").write_bytes(encoded(near))
    exif = Image.Exif()
    exif[0x0112] = 6
    (photos / "b/turned.png").write_bytes(encoded(noise(1, 8, 3, seed=7)[0], exif=exif))
    (photos / "a/bad.png").write_bytes(b"")
    report = check(data_params(photos, transform="center-crop", split={"by": "none"}))
    assert report["images"] == 25
    assert report["bad"]["count"] == 1
    assert report["modes"] == [{"name": "RGB", "count": 24}, {"name": "L", "count": 1}]
    assert report["sizes"]["commonest"] == [{"name": "8x8", "count": 24}, {"name": "16x16", "count": 1}]
    assert (report["sizes"]["smallest_side"], report["sizes"]["largest_side"], report["sizes"]["enlarged"]) == (
        8,
        16,
        0,
    )
    assert report["exif_rotated"] == {"count": 1, "files": ["b/turned.png"]}
    assert report["duplicates"]["exact"] == {
        "groups": 1,
        "repeats": 1,
        "across_parts": 0,
        "across_classes": 1,
        "files": [["a/0003.png", "b/twin.png"]],
    }
    assert report["duplicates"]["near"]["files"] == [{"first": "b/near-1.png", "second": "b/near-2.png", "bits": 0}]
    assert report["classes"] == [
        {"name": "a", "images": 11, "train": 11, "validation": 0, "test": 0},
        {"name": "b", "images": 14, "train": 14, "validation": 0, "test": 0},
    ]
    assert report["imbalance"] == round(14 / 11, 4)
    assert check(data_params(photos, resolution=32, transform="center-crop"))["sizes"]["enlarged"] == 25


def repeated_photos(root: Path) -> None:
    """Forty images in two classes; ten of them also stand there under a second name, ten with one pixel changed."""
    for index, image in enumerate(np.sort(noise(40, 8, 3), axis=1)):
        folder = root / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02d}.png").write_bytes(encoded(image))
        if index < 20:
            near = image.copy()
            near[0, 0, 0] ^= index >= 10  # brightness still grows to the right: no bit of the hash changes
            (folder / f"again-{index:02d}.png").write_bytes(encoded(near))


@pytest.mark.parametrize("kept", ["none", "repeats", "near"])
def test_what_is_together_stays_in_one_part(run: Run, kept: str, capsys: pytest.CaptureFixture[str]) -> None:
    repeated_photos(Path("photos"))
    settings = [f"data.split.together={kept}", "data.split.test=0.5", "data.near_duplicate_bits=0"]
    assert run("--output", "out", *settings) == (0, [])
    dataset = open_dataset(Path("out"))
    part = dict(zip(dataset.names, dataset.parts.tolist(), strict=True))
    pairs = [(f"{'ab'[i % 2]}/{i:02d}.png", f"{'ab'[i % 2]}/again-{i:02d}.png") for i in range(20)]
    apart = [part[one] != part[other] for one, other in pairs]
    assert any(apart[:10]) == (kept == "none")
    assert any(apart[10:]) == (kept != "near")
    report = json.loads(Path("out/report.json").read_text())
    alone = {"train": 21, "validation": 9, "test": 30}
    assert report["parts"] == alone
    assert report["duplicates"]["exact"]["across_parts"] == sum(apart[:10])
    assert report["duplicates"]["near"]["across_parts"] >= sum(apart[10:])
    assert (report["duplicates"]["near"]["groups_across_parts"] == 0) == (kept == "near")
    if kept == "none":
        assert report["together"] is None
        assert f"{sum(apart[:10])} groups of repeats lie in several parts" in report["advice"][-2]
        assert "set data.split.together=repeats" in report["advice"][-2]
        assert "data.split.together=near keeps them together" in report["advice"][-1]
    else:
        together = report["together"]
        assert together["would_cross"] > 0
        assert together["wanted"] == alone
        assert kept == "near" or (together["groups"], together["images"], together["largest"]) == (10, 20, 2)
        assert "would lie in several parts otherwise" in Path("out/report.html").read_text()
    first = contents(Path("out"))
    assert run("--output", "two", *settings, "operation.workers=1") == (0, [])
    assert contents(Path("two")) == first


def test_folders_decide_alone_where_images_go() -> None:
    says = r"needs by=fraction: folders say where each image goes; set data\.split\.together=none"
    with pytest.raises(ValueError, match=f"together=near {says}"):
        data_params(Path("photos"), split={"by": "folder", "together": "near"})
    with pytest.raises(ValueError, match="together=repeats needs by=fraction: all images are trained on"):
        data_params(Path("photos"), split={"by": "none", "together": "repeats"})


def test_near_images_that_cannot_all_be_compared_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipestill.data.duplicates.MOST_COMPARISONS", 3)
    repeated_photos(Path("photos"))
    code, lines = run("--output", "out", "data.split.together=near", "data.near_duplicate_bits=16")
    assert code == 2
    assert "too many images are alike to compare them all; lower data.near_duplicate_bits" in lines[0]


def test_folders_of_users_keep_repeats_together_and_examples_are_as_they_were() -> None:
    from pipestill import configure

    kept = {
        name: configure.compose([f"experiment={name}", *extra]).data.split.together
        for name, extra in {"own": ["data.path=photos"], "digits": [], "textures": [], "dtd": []}.items()
    }
    assert kept == {"own": "repeats", "digits": "none", "textures": "none", "dtd": "repeats"}


def test_check_says_what_small_and_uneven_classes_mean(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("big", 60), ("middle", 20), ("pair", 2), ("one", 1)):
        for index, image in enumerate(noise(count, 8, 3, seed=count)):
            Path("photos", name).mkdir(parents=True, exist_ok=True)
            Path("photos", name, f"{index}.png").write_bytes(encoded(image))
    assert cli.main(["dataset", "--check", "photos", "--report", "report", "data.near_duplicate_bits=0"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  note: ")]
    rows = {row["name"]: row for row in json.loads(Path("report/report.json").read_text())["classes"]}
    assert [rows[name]["validation"] for name in ("one", "pair")] == [0, 0]
    assert [rows[name]["test"] for name in ("one", "pair", "middle")] == [0, 1, 6]
    assert notes == [
        "  note: 2 classes (one: 1, pair: 2) have no validation image: choices made on the validation part do "
        "not consider them; add images or merge classes",
        "  note: 1 class (one: 1) has no test image: metrics say nothing about them, and their samples make "
        "every distance worse; add images or merge classes",
        "  note: 2 classes (pair: 1, middle: 6) have fewer than 10 test images: one image more or less changes the "
        "metrics of such a class by 16 points or more",
        "  note: the largest class (big, 60 images) has 60 times the images of the smallest (one, 1): distances "
        "describe mostly the large classes, and only samples of the same mix are comparable with the test images "
        "(sampling.shared.plan=data)",
    ]
    page = Path("report/report.html").read_text()
    assert "<li>The largest class (big, 60 images) has 60 times" in page
    class_folders(Path("even"), each=40)
    assert cli.main(["dataset", "--check", "even", "data.near_duplicate_bits=0"]) == 0
    assert "note:" not in capsys.readouterr().err


def test_exact_repeats_are_of_what_is_stored(tmp_path: Path) -> None:
    """Two photographs that differ outside the square that is kept, and the page says what is compared."""
    photos = class_folders(tmp_path / "photos")
    (wide,) = noise(1, 16, 3, seed=4)
    for name in ("a/left.png", "b/right.png"):
        (photos / name).write_bytes(encoded(wide[4:12]))
        wide[:, 0] ^= 1
    report = check(data_params(photos, transform="center-crop"), report=tmp_path / "report")
    assert report["duplicates"]["exact"]["files"] == [["a/left.png", "b/right.png"]]
    page = (tmp_path / "report/report.html").read_text()
    assert "Exact: 1 group of images whose pixels are the same after crop and resize." in page


def test_the_page_stands_alone_and_escapes_names(run: Run) -> None:
    class_folders(Path("photos"))
    shutil.copy("photos/a/0001.png", "photos/a/<b>&.png")
    assert run("--output", "out") == (0, [])
    page = Path("out/report.html").read_text()
    assert "&lt;b&gt;&amp;.png" in page
    assert "<b>&" not in page
    assert "http" not in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []


def test_export_through_the_command_line(run: Run, tmp_path: Path) -> None:
    class_folders(Path("photos"))
    run("--output", "out")
    assert run("--export-lmdb", "x.lmdb", "--dataset", "out") == (0, [])
    again = ["data.format=lmdb", "data.path=x.lmdb"]
    assert run("--output", "again", *again) == (0, [])
    assert (open_dataset(Path("again")).images(range(12)) == open_dataset(Path("out")).images(range(12))).all()
    code, lines = run("--export-lmdb", "x.lmdb")
    assert code == 2
    assert "--export-lmdb needs --dataset DIR" in lines[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--output", "out", "--report", "r"], "--report goes with --check alone"),
        (["--output", "out", "--dataset", "other"], "--dataset goes with --export-lmdb alone"),
        (["--check", "photos", "--part", "train"], "--part goes with --export-lmdb alone"),
    ],
)
def test_options_that_would_do_nothing_are_refused(run: Run, words: list[str], says: str) -> None:
    class_folders(Path("photos"))
    code, lines = run(*words)
    assert code == 2
    assert says in lines[0]
    assert not Path("out").exists()


def test_a_truncated_lmdb_through_the_command_line(run: Run) -> None:
    class_folders(Path("photos"), each=50)
    run("--output", "out")
    run("--export-lmdb", "x.lmdb", "--dataset", "out")
    content = Path("x.lmdb").read_bytes()
    Path("x.lmdb").write_bytes(content[: len(content) // 2])
    code, lines = run("--output", "again", "data.format=lmdb", "data.path=x.lmdb")
    assert code == 2
    assert len(lines) == 1
    assert "x.lmdb is truncated" in lines[0]


# ---- examples ----


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    artifact = write_example(ExampleParams(kind="digits"), tmp_path / "digits")
    assert artifact.manifest.kind == "images"
    images = tmp_path / "digits" / "images"
    bunch = load_digits()
    for index in (0, 1000, 1796):
        pixels = np.asarray(Image.open(images / str(bunch.target[index]) / f"{index:04d}.png"))
        assert (pixels == np.rint(bunch.images[index] * 255 / 16)).all()
    assert len(list(images.rglob("*.png"))) == 1797
    params = data_params(images, color="grey")
    dataset = build(params, tmp_path / "dataset", workers=2)
    assert dataset.manifest.inputs["images"] == artifact.as_input
    assert dataset.manifest.summary["parts"] == {"train": 988, "validation": 270, "test": 539}

    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(images / "0" / "mine.png")
    with pytest.raises(InputError, match=r"digits and its manifest differ in '0/mine\.png'"):
        build(params, tmp_path / "dataset")


@pytest.mark.parametrize("side", [16, 32])
def test_no_held_out_pixel_is_in_a_training_patch(side: int) -> None:
    seen = {(texture, part): np.zeros((512, 512), dtype=bool) for texture in TEXTURES for part in ROWS}
    counts = dict.fromkeys(ROWS, 0)
    for patch in patches(side, 8):
        assert 0 <= patch.row <= 512 - side
        assert 0 <= patch.column <= 512 - side
        seen[patch.texture, patch.part][patch.row : patch.row + side, patch.column : patch.column + side] = True
        counts[patch.part] += 1
    for texture in TEXTURES:
        train, validation, test = (seen[texture, part] for part in ("train", "validation", "test"))
        assert not (train & validation).any()
        assert not (train & test).any()
        assert not (validation & test).any()
        assert (train | validation | test).all()
    assert (
        counts
        == {
            16: {"train": 6237, "validation": 1701, "test": 3591},
            32: {"train": 5673, "validation": 372, "test": 837},
        }[side]
    )


def test_textures_are_cut_from_the_photographs(tmp_path: Path) -> None:
    from skimage import data

    write_example(ExampleParams(kind="textures", patch=32, stride=64), tmp_path / "textures")
    images = tmp_path / "textures" / "images"
    assert sorted(path.name for path in images.iterdir()) == ["test", "train", "validation"]
    patch = np.asarray(Image.open(images / "train" / "gravel" / "r064-c128.png"))
    assert (patch == data.gravel()[64:96, 128:160]).all()
    params = data_params(images, color="grey", resolution=32, split={"by": "folder"})
    dataset = build(params, tmp_path / "dataset", workers=2)
    assert dataset.manifest.summary["parts"] == {"train": 96, "validation": 372, "test": 837}


# ---- a full disk ----

BUILD = [sys.executable, "-m", "pipestill", "dataset"]


def test_a_file_that_cannot_grow_ends_with_one_line(run: Run) -> None:
    """The limit stands for a quota; it hits a worker's slots."""
    class_folders(Path("photos"), each=100, side=32)
    arguments = ["--output", "out", "data.resolution=32"]
    assert run(*arguments) == (0, [])
    before = contents(Path("out"))
    limited = subprocess.run(
        [*BUILD, *arguments, "data.split.seed=1"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert limited.returncode == 3
    (line,) = [line for line in limited.stderr.splitlines() if line.startswith("pipestill dataset: ")]
    assert "could not be written (File too large)" in line
    assert contents(Path("out")) == before


def test_a_short_write_of_numpys_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk NumPy raises an OSError without a number."""

    def short(*_: object) -> None:
        raise OSError("1024 requested and 12 written")

    class_folders(Path("photos"))
    monkeypatch.setattr(np, "save", short)
    code, lines = run("--output", "out")
    assert code == 3
    assert "could not be written: 1024 requested and 12 written" in lines[0]


@pytest.mark.skipif(not can_mount(), reason="no mount namespace here")
@pytest.mark.parametrize("full", ["runs", "artifacts"])
def test_a_full_disk_ends_with_one_line_and_room_lets_it_go_on(run: Run, full: str) -> None:
    """A real file system of 400 kB: first where the work goes on, then where the artefact goes."""
    class_folders(Path("photos"), each=100, side=32)
    arguments = "--output artifacts/out data.resolution=32"
    assert run(*arguments.replace("artifacts/out", "wanted").split()) == (0, [])
    shutil.rmtree("runs")
    Path(full).mkdir()
    command = " ".join([*BUILD, arguments])
    script = (
        f"mount -t tmpfs -o size=400k tmpfs {full}; {command} >first.txt 2>&1; echo $? >first.code; "
        f"ls -A artifacts >there.txt; mount -o remount,size=64m {full}; "
        f"{command} >second.txt 2>&1; echo $? >second.code; "
        "cp -r artifacts/out kept"
    )
    subprocess.run(["unshare", "-rm", "sh", "-c", script], check=True)
    assert Path("first.code").read_text() == "3\n", Path("first.txt").read_text()
    (line,) = [line for line in Path("first.txt").read_text().splitlines() if line.startswith("pipestill dataset: ")]
    assert "No space left on device" in line
    assert "out" not in Path("there.txt").read_text().splitlines()
    assert Path("second.code").read_text() == "0\n", Path("second.txt").read_text()
    assert contents(Path("kept")) == contents(Path("wanted"))


# ---- kills ----


def _killed_and_resumed(kills: int, seed: int) -> None:
    """A build killed so many times at random moments, then finished, gives the bytes of one that was never killed."""
    class_folders(Path("photos"), classes=4, each=400, side=64)
    arguments = ["data.resolution=64", "operation.workers=2"]
    environment = os.environ | {"PIPESTILL_RUNS": "runs-wanted"}
    import time

    started = time.monotonic()
    subprocess.run([*BUILD, "--output", "wanted", *arguments], env=environment, check=True, capture_output=True)
    whole = time.monotonic() - started
    moments = np.random.default_rng(seed).uniform(0.15 * whole, whole, kills)
    for moment in moments:
        victim = subprocess.Popen([*BUILD, "--output", "out", *arguments], stderr=subprocess.PIPE)
        try:
            victim.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            victim.kill()
        victim.communicate(timeout=20)  # the pipe closes when the last worker has ended
        if Path("out").exists():
            assert contents(Path("out")) == contents(Path("wanted"))
            shutil.rmtree("out")
    subprocess.run([*BUILD, "--output", "out", *arguments], check=True, capture_output=True)
    assert contents(Path("out")) == contents(Path("wanted"))


def test_a_killed_build_goes_on(run: Run) -> None:
    _killed_and_resumed(kills=4, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_killed_build_goes_on_soak(run: Run, seed: int) -> None:
    _killed_and_resumed(kills=20, seed=seed)


def test_what_the_journal_vouches_for_is_not_decoded_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipestill.data import ingest
    from pipestill.stopping import StopRequest

    class_folders(Path("photos"), each=200)
    decoded: list[int] = []
    plain = ingest._Job.decode

    def counted(job: Any, chunk: int) -> Any:
        decoded.append(chunk)
        return plain(job, chunk)

    monkeypatch.setattr(ingest._Job, "decode", counted)
    stop = StopRequest()
    monkeypatch.setattr(stop, "requested", lambda: len(decoded) == 3)
    stop.reason = "a test"
    with pytest.raises(Exception, match="stopped by a test with its state saved"):
        build(data_params(Path("photos")), Path("out"), stop=stop)
    (journal,) = Path("runs").rglob("journal.jsonl")
    with journal.open("ab") as file:
        file.write(b'{"chunk": 3, "ba')  # torn by a kill
    build(data_params(Path("photos")), Path("out"))
    assert decoded == list(range(7))
    assert (open_dataset(Path("out")).images(range(400)) == noise(400, 8, 3)).all()


def test_a_stop_request_ends_with_its_exit_code(run: Run) -> None:
    class_folders(Path("photos"))
    code, lines = run("--output", "out", "--deadline-min", "0")
    assert code == 75
    assert "stopped by its time limit with its state saved" in lines[0]
    os.environ.pop("PIPESTILL_DEADLINE", None)
    assert run("--output", "out") == (0, [])


def test_a_stop_ends_the_decoding_processes_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipestill.data import ingest

    class_folders(Path("photos"), each=320)
    monkeypatch.setattr(ingest._Job, "decode", lambda job, chunk: time.sleep(600))
    stop = StopRequest()
    stop.reason = "a test"
    callers = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    callers.start()
    try:
        with pytest.raises(Stopped):
            build(data_params(Path("photos")), Path("out"), workers=2, stop=stop)
        assert multiprocessing.active_children() == [callers]
    finally:
        callers.kill()
        callers.join()


def test_sigterm_saves_the_state_and_a_dead_worker_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipestill.data import ingest

    class_folders(Path("photos"), each=320)
    plain = ingest._Job.decode
    test = os.getpid()

    def fatal(job: Any, chunk: int) -> Any:
        if chunk == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(job, chunk)

    monkeypatch.setattr(ingest._Job, "decode", fatal)
    code, lines = run("--output", "out")
    assert code == 3
    assert lines == [
        "pipestill dataset: a decoding process was ended (out of memory?): start it again to go on",
    ]

    def told(job: Any, chunk: int) -> Any:
        os.kill(test, signal.SIGTERM)
        return plain(job, chunk)

    monkeypatch.setattr(ingest._Job, "decode", told)
    stopped = ["pipestill dataset: stopped by SIGTERM with its state saved: start it again to go on"]
    # into folders of their own: where a single chunk is left, no process is started for it
    assert run("--output", "told") == (75, stopped)
    monkeypatch.setattr(ingest._Job, "decode", plain)

    leave = futures._AcquireFutures.__exit__

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)  # while a wait holds the locks of its futures
        leave(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(futures._AcquireFutures, "__exit__", interrupted)
        assert run("--output", "locked") == (75, stopped)

    def hangs(job: Any, chunk: int) -> Any:
        os.kill(test, signal.SIGTERM)
        time.sleep(600)

    monkeypatch.setattr(ingest._Job, "decode", hangs)
    assert run("--output", "hung") == (75, stopped)
    monkeypatch.setattr(ingest._Job, "decode", plain)
    assert run("--output", "told") == (0, [])
    assert (open_dataset(Path("told")).images(range(640)) == noise(640, 8, 3)).all()
