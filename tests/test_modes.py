"""Modes of files, and files that may not be read."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipestill import artifacts, cli, modes, work
from pipestill.artifacts import Manifest, describe_files, publish
from pipestill.data.store import export_dmd2, open_dataset
from pipestill.errors import InputError
from pipestill.sampling.pipeline import PixelPipeline
from pipestill.training import state
from tiny_models import make_model
from workflow_project import Project

UMASKS = (0o002, 0o022, 0o077)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def found_modes(folder: Path) -> dict[str, set[int]]:
    """The modes of all files and folders below a folder."""
    found: dict[str, set[int]] = {"files": set(), "folders": set()}
    for path in folder.rglob("*"):
        if not path.is_symlink():
            found["folders" if path.is_dir() else "files"].add(stat.S_IMODE(path.stat().st_mode))
    return found


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_what_libraries_write_follows_the_umask(mask: int, tmp_path: Path, digits: Path) -> None:
    """safetensors writes through a temporary file of mode 0600, LMDB makes its files executable."""
    with umask(mask):
        make_model(tmp_path / "model", unconditional=False)
        words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
        assert cli.main(["export", *words, "--licence", "CC0-1.0"]) == 0
        PixelPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
        dataset = open_dataset(digits)
        export_dmd2(dataset, dataset.split["test"][:9], tmp_path / "test.lmdb")
        state.save(tmp_path / "state", 3, {"weights": torch.zeros(3)}, key="key")
        work.write_atomic(tmp_path / "note", "text")
    assert found_modes(tmp_path) == {"files": {0o666 & ~mask}, "folders": {0o777 & ~mask}}
    assert len(list(tmp_path.rglob("*.safetensors"))) >= 4


def test_a_whole_pipeline_follows_the_umask(tiny: Project) -> None:
    """Artefacts, metrics, and what lies below runs/: states, logs, records."""
    before = os.umask(0)
    os.umask(before)
    for folder in ("artifacts", "metrics", "runs", "data"):
        found = found_modes(tiny.root / folder)
        assert found["files"] == {0o666 & ~before}, folder
        assert found["folders"] <= {0o777 & ~before}, folder


def test_folders_keep_their_group(tmp_path: Path) -> None:
    """In a folder with the set-group-ID bit, as colleagues share them, new folders have it too."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    with umask(0o002):
        make_model(shared / "model")
    assert found_modes(shared) == {"files": {0o664}, "folders": {0o2775}}


def test_default_acls_go_before_the_umask(tmp_path: Path) -> None:
    entries = [(0x01, 7, -1), (0x04, 7, -1), (0x20, 0, -1)]  # user, group and others: rwx, rwx, nothing
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("no ACLs here")
    with umask(0o077):
        make_model(tmp_path / "model")
    assert found_modes(tmp_path) == {"files": {0o660}, "folders": {0o770}}


def test_links_and_files_outside_are_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.touch(0o600)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(outside)
    modes.follow_umask(tmp_path / "in")
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["link"]


# --- what may not be read -----------------------------------------------------------------------------------------


def unprivileged(*words: object, folder: Path) -> tuple[int, str]:
    """A command whose user may not read everything: root without the capabilities that let it."""
    command = [sys.executable, "-m", "pipestill", *map(str, words)]
    if os.geteuid() == 0:
        powers = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}", *command]
    variables = os.environ | {"PIPESTILL_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def refused(path: Path, *words: object, folder: Path, mode: int = 0) -> None:
    """A command ends with 2 and one line that names the file, while the file's mode is 0."""
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        code, said = unprivileged(*words, folder=folder)
    finally:
        path.chmod(stat.S_IMODE(before))
    lines = [line for line in said.splitlines() if "nothing to do" not in line]
    assert (code, len(lines)) == (2, 1), said
    assert "permission denied" in lines[0].lower()
    assert path.name in lines[0]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny: Project) -> Path:
    root = tmp_path_factory.mktemp("unreadable") / "project"
    return tiny.copy(root).root


MODEL = "artifacts/models/student-4"
SAMPLE = f"sample --name student-4 --model {MODEL} --sigmas {MODEL} --output out"
EVALUATE = "evaluate --name x --samples artifacts/samples/student-4 --reference artifacts/reference --output out"
TRAIN = "train --name teacher --dataset artifacts/dataset --output out"


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("params.yaml", "config --check"),
        ("artifacts/models/student-4", SAMPLE),
        ("artifacts/models/student-4/unet/diffusion_pytorch_model.safetensors", SAMPLE),
        ("artifacts/models/student-4/unet", "export --model artifacts/models/student-4 --output out --licence CC0-1.0"),
        ("artifacts/reference/classifier.safetensors", EVALUATE),
        ("artifacts/dataset/images.lmdb", TRAIN),
        ("metrics/student-4.json", "trace metrics/student-4.json"),
        ("dvc.yaml", "status"),
    ],
)
def test_an_unreadable_file_is_one_line(file: str, command: str, project: Path) -> None:
    refused(project / file, *command.split(), folder=project)
    assert not (project / "out").exists()


def test_unreadable_files_of_the_user_are_one_line(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    images = tmp_path / "images.npz"
    images.write_bytes(b"x")
    words = ["dataset", "--check", images, "--quiet", "data.format=npz", "data.resolution=8"]
    refused(images, *words, folder=tmp_path)


def test_a_denied_file_says_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "model")
    weights = next((tmp_path / "model").rglob("*.safetensors"))
    weights.chmod(0o600)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != weights and allowed(path, mode))
    with pytest.raises(InputError, match=r"safetensors: permission denied \(it belongs to \w+, -rw-------\): have it"):
        artifacts.read(tmp_path / "model", "model")


def test_publishing_fixes_modes_before_the_manifest_is_there(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "weights").touch(0o600)
    publish(staging, tmp_path / "model", Manifest("model", "train", 1, {}, {}, describe_files(staging)))
    mark = tmp_path / "model" / ".pipestill"
    assert found_modes(tmp_path / "model")["files"] == {stat.S_IMODE(mark.stat().st_mode)}
