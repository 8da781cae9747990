"""Artefacts are whole or not there, deterministic, checked when read; work is locked, resumable and never redone."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipestill import artifacts
from pipestill.artifacts import FileEntry, InputEntry, Manifest
from pipestill.errors import InputError, SurroundingsError
from pipestill.tracing import trace
from pipestill.work import Work, open_work, read_record


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def make(output: Path, content: bytes = b"payload", **changes: object) -> artifacts.Artifact | None:
    """Publishes a small artefact, or returns None where it is there already."""
    arguments: dict[str, object] = {
        "kind": "dataset",
        "stage": "dataset",
        "version": 1,
        "parameters": {"resolution": 8},
        "inputs": {"images": InputEntry("folder", "0" * 64)},
    }
    with open_work(output=output, **(arguments | changes)) as work:  # type: ignore[arg-type]
        if work.done:
            return None
        staging = work.staging()
        (staging / "sub").mkdir()
        (staging / "sub" / "data.bin").write_bytes(content)
        return work.publish(staging, {"count": 3})


def test_equal_work_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert first is not None
    assert second is not None
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()
    assert first.manifest.payload == second.manifest.payload


def test_payload_digest_depends_on_content_name_and_kind() -> None:
    files = {"a": FileEntry(1, "x")}
    digests = {
        artifacts.payload_digest("dataset", files),
        artifacts.payload_digest("model", files),
        artifacts.payload_digest("dataset", {"b": FileEntry(1, "x")}),
        artifacts.payload_digest("dataset", {"a": FileEntry(1, "y")}),
    }
    assert len(digests) == 4


def test_the_second_time_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert make(tmp_path / "a") is not None
    before = (tmp_path / "a" / "sub" / "data.bin").stat().st_ino
    assert make(tmp_path / "a") is None
    assert (tmp_path / "a" / "sub" / "data.bin").stat().st_ino == before


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"resolution": 16}},
        {"version": 2},
        {"inputs": {"images": InputEntry("folder", "1" * 64)}},
    ],
)
def test_changed_work_is_done_again(tmp_path: Path, change: dict[str, object]) -> None:
    make(tmp_path / "a")
    assert make(tmp_path / "a", b"other", **change) is not None
    assert (tmp_path / "a" / "sub" / "data.bin").read_bytes() == b"other"


def test_a_damaged_artefact_is_made_again(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "sub" / "data.bin").write_bytes(b"PAYLOAD")  # the same size
    with pytest.raises(InputError, match="differs from its manifest"):
        artifacts.verify(artifacts.read(tmp_path / "a", "dataset"))
    assert make(tmp_path / "a") is not None
    artifacts.verify(artifacts.read(tmp_path / "a", "dataset"))


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(InputError, match="is a dataset artefact, a model was expected"):
        artifacts.read(tmp_path / "a", "model")
    with pytest.raises(InputError, match="does not exist"):
        artifacts.read(tmp_path / "b", "dataset")
    with pytest.raises(InputError, match="is no artefact"):
        artifacts.read(tmp_path, "dataset")
    (tmp_path / "a" / "sub" / "data.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="5 bytes, 7 were written"):
        artifacts.read(tmp_path / "a", "dataset")
    (tmp_path / "a" / "sub" / "data.bin").unlink()
    with pytest.raises(InputError, match="is missing"):
        artifacts.read(tmp_path / "a", "dataset")
    manifest = tmp_path / "a" / "manifest.json"
    body = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(body | {"files": {}}))
    with pytest.raises(InputError, match="does not match the files"):
        artifacts.read(tmp_path / "a", "dataset")
    manifest.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        artifacts.read(tmp_path / "a", "dataset")


def test_an_interrupted_publication_leaves_the_old_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a")

    def fail(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "_exchange", fail)
    with pytest.raises(SurroundingsError, match="No space left"):
        make(tmp_path / "a", b"other", version=2)
    old = artifacts.read(tmp_path / "a", "dataset")
    artifacts.verify(old)
    assert old.manifest.version == 1


def test_a_reader_never_sees_half_an_artefact(tmp_path: Path) -> None:
    """A child republishes the artefact over and over while this process reads it."""
    make(tmp_path / "a")
    child = subprocess.Popen(
        [sys.executable, "-c", _REPUBLISH, str(tmp_path / "a")], env=os.environ, stdout=subprocess.PIPE
    )
    seen = set()
    while child.poll() is None:
        try:
            artifact = artifacts.read(tmp_path / "a", "dataset")
        except InputError as error:
            # between our reading the manifest and the file, the folder may have been exchanged; it is never absent
            assert "does not exist" not in str(error)  # noqa: PT017
            assert "is no artefact" not in str(error)  # noqa: PT017
            continue
        seen.add(artifact.manifest.version)
    assert child.returncode == 0
    assert len(seen) > 1


_REPUBLISH = """
import sys
from pathlib import Path
from pipestill.work import open_work
output = Path(sys.argv[1])
for version in range(2, 80):
    with open_work(kind="dataset", stage="dataset", version=version, parameters={}, inputs={}, output=output) as work:
        staging = work.staging()
        (staging / "data.bin").write_bytes(b"x" * version)
        work.publish(staging, {})
"""


def test_two_processes_cannot_write_one_artefact(tmp_path: Path) -> None:
    work = {"kind": "dataset", "stage": "dataset", "version": 1, "parameters": {}, "inputs": {}}
    with (
        open_work(output=tmp_path / "a", **work),  # type: ignore[arg-type]
        pytest.raises(SurroundingsError, match="being written by another process"),
        open_work(output=tmp_path / "a", **work | {"version": 2}),  # type: ignore[arg-type]
    ):
        pass
    assert make(tmp_path / "a") is not None


def test_the_lock_is_the_outputs_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = {"kind": "dataset", "stage": "dataset", "version": 1, "parameters": {}, "inputs": {}}
    with open_work(output=tmp_path / "a", **work) as held:  # type: ignore[arg-type]
        staging = held.staging()
        monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "other runs"))
        with (
            pytest.raises(SurroundingsError, match="being written by another process"),
            open_work(output=tmp_path / "a", **work),  # type: ignore[arg-type]
        ):
            pass
        assert staging.is_dir()
    assert not list(tmp_path.rglob("*.lock"))


def test_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    work = {"kind": "dataset", "stage": "dataset", "version": 1, "parameters": {"resolution": 8}, "inputs": {}}
    with open_work(output=tmp_path / "a", **work) as opened:  # type: ignore[arg-type]
        (opened.state / ".state.pt.77.partial").write_text("torn")
    with open_work(output=tmp_path / "a", **work) as opened:  # type: ignore[arg-type]
        assert not list(opened.state.iterdir())
        (opened.staging() / "x").write_text("x")
        opened.publish(tmp_path / ".a.partial", {})
        (opened.state / "late").write_text("killed after publishing")
    with open_work(output=tmp_path / "a", **work) as opened:  # type: ignore[arg-type]
        assert opened.done is not None
        assert not (opened.folder / "state").exists()


@pytest.mark.parametrize("there", ["folder", "file", "other kind", "input", "below a file"])
def test_what_is_no_older_artefact_of_the_kind_is_never_replaced(tmp_path: Path, there: str) -> None:
    place, changes, message = (
        tmp_path / "place",
        {},
        "holds what pipestill did not make, and is left alone: name another --output",
    )
    if there == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
    elif there == "file":
        place.write_text("years of work")
    elif there == "other kind":
        make(place, kind="model")
        message = "is a model artefact, a dataset would replace it"
    elif there == "input":
        made = make(place)
        assert made is not None
        changes, message = {"inputs": {"teacher": made.as_input}}, "is an input of this work"
    else:
        place.write_text("years of work")
        message = "is no folder, nothing can lie below it"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "runs" not in path.parts}
    with pytest.raises(InputError, match=message):
        make(place / "below" if there == "below a file" else place, **changes)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "runs" not in path.parts}
    assert after == before


@pytest.mark.parametrize("left", ["nothing", "no manifest", "a damaged manifest"])
def test_an_empty_folder_and_what_tools_leave_of_an_artefact_are_taken(tmp_path: Path, left: str) -> None:
    (tmp_path / "a").mkdir()
    if left != "nothing":
        make(tmp_path / "a")
        (tmp_path / "a" / "manifest.json").unlink()
    if left == "a damaged manifest":
        (tmp_path / "a" / "manifest.json").write_text("{")
    assert make(tmp_path / "a") is not None
    assert artifacts.read(tmp_path / "a", "dataset").file("sub/data.bin").read_bytes() == b"payload"


def test_a_missing_view_is_missed(tmp_path: Path) -> None:
    with open_work(kind="report", stage="report", version=1, parameters={}, inputs={}, output=tmp_path / "a") as work:
        staging = work.staging()
        (staging / "index.html").write_text("took 3 s")
        work.publish(staging, {}, views=("index.html",))
    (tmp_path / "a" / "index.html").unlink()
    with pytest.raises(InputError, match=r"index\.html is missing"):
        artifacts.read(tmp_path / "a", "report")


@pytest.mark.parametrize("library", ["numpy", "safetensors", "torch"])
def test_a_full_disk_is_said_whoever_writes(tmp_path: Path, library: str) -> None:
    """A limit on the size of a file stands for the disk; neither library raises what a plain write would."""
    script = f"""
import resource, signal, sys
from pathlib import Path
import numpy, torch
from pipestill.errors import SurroundingsError
from pipestill.work import atomically, writing
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with writing(Path("place")):
        if {library!r} == "numpy":
            numpy.save("x.npy", numpy.zeros(1_000_000))
        elif {library!r} == "torch":
            with atomically(Path("place")) as file:
                torch.save({{"x": torch.zeros(1_000_000)}}, file)
        else:
            save_file({{"x": torch.zeros(1_000_000)}}, "x.safetensors")
except SurroundingsError as error:
    sys.exit(0 if "place could not be written" in str(error) else 1)
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False).returncode == 0


def test_state_survives_until_the_artefact_is_there(tmp_path: Path) -> None:
    work = {"kind": "dataset", "stage": "dataset", "version": 1, "parameters": {}, "inputs": {}}

    def attempt() -> Work:
        with open_work(output=tmp_path / "a", **work) as opened:  # type: ignore[arg-type]
            return opened

    (attempt().state / "half").write_text("done")
    assert (attempt().state / "half").read_text() == "done"
    make(tmp_path / "a", parameters={}, inputs={})
    assert not (attempt().folder / "state").exists()


def test_records_add_up_the_seconds_of_all_attempts(tmp_path: Path) -> None:
    work = {"kind": "dataset", "stage": "dataset", "version": 1, "parameters": {}, "inputs": {}}
    with open_work(output=tmp_path / "a", **work) as first:  # type: ignore[arg-type]
        first.started -= 10
        first.record()
    with open_work(output=tmp_path / "a", **work) as second:  # type: ignore[arg-type]
        second.started -= 5
        second.record(finished=True, images=7)
    record = read_record("dataset", second.key)
    assert record["seconds"] == pytest.approx(15, abs=1)
    assert record["images"] == 7
    assert read_record("dataset", "f" * 64) == {}


def test_views_are_outside_the_payload(tmp_path: Path) -> None:
    payloads = []
    for text in ("took 3 s", "took 5 s"):
        with open_work(
            kind="report", stage="report", version=1, parameters={}, inputs={}, output=tmp_path / text
        ) as work:
            staging = work.staging()
            (staging / "report.json").write_text("{}")
            (staging / "index.html").write_text(text)
            payloads.append(work.publish(staging, {}, views=("index.html",)).manifest.payload)
    assert payloads[0] == payloads[1]


def test_outside_folders_are_known_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    one = artifacts.outside_input(tmp_path)
    (tmp_path / "a").write_text("2")
    two = artifacts.outside_input(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    three = artifacts.outside_input(tmp_path)
    assert len({one, two, three}) == 3


def test_manifest_round_trip() -> None:
    manifest = Manifest(
        "model", "train", 1, {"a": [1, 2]}, {"x": InputEntry("k", "p")}, {"f": FileEntry(3, "d")}, {"s": 1}
    )
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.timeout(30)
def test_outside_files_that_cannot_be_read_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("1")
    odd = tmp_path / "odd"
    os.mkfifo(odd)
    for path in (tmp_path, odd):
        with pytest.raises(InputError, match=r"odd cannot be read \(it is a named pipe, not a file\)$"):
            artifacts.outside_input(path)
    odd.unlink()
    with pytest.raises(InputError, match=r"odd cannot be read \(No such file or directory\)$"):
        artifacts.outside_input(odd)
    latin = tmp_path / os.fsdecode(b"\xfc")
    latin.touch()
    with pytest.raises(InputError, match=r"\\xfc has a name that is not UTF-8"):
        artifacts.outside_input(tmp_path)
    latin.unlink()

    def refuse(path: str, *arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"a cannot be read \(Permission denied\)$"):
        artifacts.outside_input(tmp_path)


@pytest.mark.timeout(30)
def test_metrics_that_are_no_file_of_metrics_are_one_line(tmp_path: Path) -> None:
    """`pipestill trace` and `pipestill export --metrics`."""
    path = tmp_path / "run.json"
    for make, says in (
        (lambda: os.mkfifo(path), r"run\.json cannot be read \(it is a named pipe, not a file\)$"),
        (lambda: path.mkdir(), r"run\.json cannot be read \(it is a folder, not a file\)$"),
        (lambda: path.write_bytes(b"\xff"), "run.json cannot be read as JSON"),
        (lambda: path.write_text("[[1]]"), "run.json holds no metrics"),
    ):
        make()
        with pytest.raises(InputError, match=says):
            trace(path, tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
