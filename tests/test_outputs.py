"""What commands may replace: every written path of every command, and writing whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import here
from edm_files import TINY, random_tensors
from evaluation_artifacts import make_dataset, make_samples, publish_dataset
from images import class_folders, noise
from pipestill import artifacts, cli, configure, outputs, running
from pipestill.artifacts import MARK, Manifest, describe_files
from pipestill.errors import InputError, SurroundingsError
from pipestill.networks import adm
from pipestill.networks.model import ModelCard, save_model
from pipestill.outputs import Written
from pipestill.project import PATHS
from pipestill.stages.convert import to_edm
from pipestill.stages.dataset import export
from pipestill.stages.sample import write_pngs

# Options with a path that is only read. A new option with a path belongs here, or has the type `Written`.
READ = {
    *((command, "--params") for command in ("example", "fetch", "dataset", "reference", "convert", "train", "tune")),
    *((command, "--params") for command in ("distill", "sample", "evaluate", "report", "bench")),
    *((command, "--dataset") for command in ("dataset", "reference", "convert", "train", "distill", "sample")),
    *((command, "--dataset") for command in ("evaluate", "report", "bench")),
    *((command, "--model") for command in ("convert", "tune", "sample", "export")),
    *((command, "--reference") for command in ("tune", "distill", "evaluate", "report")),
    *((command, "--samples") for command in ("evaluate", "report", "export")),
    ("export", "--metrics"),
    *(("report", option) for option in ("--models", "--evaluations", "--tuned", "--print-table")),
    *(("distill", option) for option in ("--teacher", "--init")),
    *(("sample", option) for option in ("--sigmas", "--extractors")),
    ("fetch", "--from"),
    ("dataset", "--check"),
    ("convert", "--input"),
    ("train", "--start"),
    ("evaluate", "--watch"),
    ("trace", "path"),
    ("clean", "paths"),
    ("clean", "--archive"),  # files are moved into it, each to a name that is free
}
# Options with a path that is changed by a rule of its own, and the tests of that rule.
BY_OTHER_RULES = {
    ("clean", "paths"): "test_clean.py: what is listed is deleted if the answer is yes",
    ("clean", "--archive"): "test_clean.py: an archive replaces nothing",
}


def parser_of(command: str) -> argparse.ArgumentParser:
    return running.parser_of(command, running.module_of(command))


def path_options() -> Iterator[tuple[str, argparse.Action]]:
    for command in cli.COMMANDS:
        for action in parser_of(command)._actions:
            if action.type is Path or isinstance(action.type, Written) or action.metavar in PATHS:
                yield command, action


def name_of(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


WRITTEN = [(command, name_of(action)) for command, action in path_options() if isinstance(action.type, Written)]


def words_for(command: str, given: dict[str, str]) -> list[str]:
    """A command line with these options, and something for every other one that is needed."""
    parser, words = parser_of(command), [word for pair in given.items() for word in pair]
    for action in parser._actions:
        if action.required and name_of(action) not in given:
            words += [*action.option_strings[:1], f"some-{action.dest}"]
    for group in parser._mutually_exclusive_groups:
        names = [name_of(action) for action in group._group_actions]
        if group.required and not set(names) & set(given):
            words += [names[0], f"some-{names[0].strip('-')}"]
    return [command, *words]


def test_every_option_with_a_path_is_known_as_read_or_written() -> None:
    options = {(command, name_of(action)) for command, action in path_options()}
    assert options - set(WRITTEN) == READ | set(BY_OTHER_RULES)
    assert {("reference", "--metrics"), ("evaluate", "--metrics"), ("sample", "--png")} < set(WRITTEN)
    assert {("dataset", "--export-lmdb"), ("dataset", "--report"), ("convert", "--to-edm")} < set(WRITTEN)
    assert {("bench", "--output"), ("export", "--output"), ("config", "--output")} < set(WRITTEN)


def a_file(place: Path) -> None:
    place.write_bytes(b"\x93 somebody's own \xff")


def a_text(place: Path) -> None:
    place.write_text('{"protocol": 3}\n')


def a_folder(place: Path) -> None:
    place.mkdir()
    (place / "letter.txt").write_text("dear")


def an_artefact_of_another_kind(place: Path) -> None:
    a_folder(place)
    (place / MARK).write_text("another\n")


def a_pipe(place: Path) -> None:
    os.mkfifo(place)


def a_dangling_link(place: Path) -> None:
    place.symlink_to("nowhere")


def snapshot(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): (path.is_symlink(), path.read_bytes() if path.is_file() else path.is_dir())
        for path in sorted(folder.rglob("*"))
    }


FOREIGN = (a_file, a_text, a_folder, an_artefact_of_another_kind, a_pipe, a_dangling_link)


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda maker: maker.__name__)
def test_every_written_path_leaves_foreign_files_and_folders_alone(
    foreign: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for command, option in WRITTEN:
        place = Path(f"{command}{option}.pt")
        foreign(place)
        before = snapshot(tmp_path)
        code = cli.main(words_for(command, {option: str(place)}))
        (said,) = capsys.readouterr().err.splitlines()
        assert (code, str(place) in said) == (2, True), f"{command} {option}: {said}"
        assert snapshot(tmp_path) == before, f"{command} {option}"


def test_no_command_writes_over_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [(command, out, read) for command, out in WRITTEN for other, read in READ if other == command]
    exclusive = {("evaluate", "--metrics", "--watch"), ("dataset", "--output", "--check")}
    exclusive |= {("dataset", "--export-lmdb", "--check"), ("report", "--output", "--print-table")}
    for number, (command, out, read) in enumerate(sorted(set(pairs) - exclusive)):
        place = tmp_path / str(number)  # nothing is there: it is refused because it is an input
        code = cli.main(words_for(command, {out: str(place), read: str(place)}))
        said = capsys.readouterr().err.splitlines()[-1]
        assert (code, "an input of this command" in said) == (2, True), f"{command} {out} {read}: {said}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sample", "--name", "x", "--model", "m", "--output", "a", "--png", "a"], "--output a and --png a overlap"),
        (
            ["sample", "--name", "x", "--model", "m", "--output", "a", "--png", "a/b"],
            "--output a and --png a/b overlap",
        ),
        (["reference", "--dataset", "d", "--output", "a", "--metrics", "a/f.json"], "overlap: use separate paths"),
        (["sample", "--name", "x", "--model", "in", "--output", "in/a"], "--output in/a lies inside in, an input"),
        (["sample", "--name", "x", "--model", "deep/in", "--output", "deep"], "would replace deep/in, an input"),
        (["dataset", "--output", "photos/out", "data.path=photos"], "lies among the images of photos"),
        (["dataset", "--output", "photos/out", "data.path=photos/out/x"], "would replace photos/out/x, an input"),
    ],
)
def test_outputs_overlap_neither_inputs_nor_each_other(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "deep/in"):
        Path(folder).mkdir(parents=True)
        Path(folder, MARK).write_text("model\n")
    class_folders(Path("photos"))
    Path("photos/out").mkdir()
    before = snapshot(tmp_path)
    if words[-1] == "deep":
        Path("deep", MARK).write_text("samples\n")
        before = snapshot(tmp_path)
    assert cli.main(words) == 2
    assert says in capsys.readouterr().err
    assert snapshot(tmp_path) == before


# --- what an earlier call wrote is replaced ------------------------------------------------------------------------


def test_an_exported_lmdb_is_replaced_and_its_source_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    export(make_dataset(Path("large"), 60), Path("x.lmdb"))
    large = Path("x.lmdb").read_bytes()
    export(make_dataset(Path("small"), 30), Path("x.lmdb"))
    assert Path("x.lmdb").read_bytes() != large
    monkeypatch.setattr("pipestill.data.store.COMMIT_BYTES", 1000)  # as in large files, of many transactions
    export(Path("small"), Path("x.lmdb"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    export(Path("large"), Path("x.lmdb"))
    assert Path("x.lmdb").read_bytes() == large

    source = ["data.format=lmdb", "data.path=x.lmdb", "data.resolution=8", "data.color=grey", "data.transform=none"]
    here("dataset", "--output", "again", *source, runs=tmp_path / "runs")
    assert cli.main(["dataset", "--export-lmdb", "x.lmdb", "--dataset", "again"]) == 2
    assert "would replace x.lmdb, an input of this command" in capsys.readouterr().err
    assert Path("x.lmdb").read_bytes() == large


def test_an_lmdb_of_others_in_the_same_layout_is_kept(tmp_path: Path) -> None:
    import lmdb

    with lmdb.open(str(tmp_path / "x.lmdb"), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        transaction.put(b"images_shape", b"0 1 8 8")
        transaction.put(b"labels_shape", b"0")
    before = (tmp_path / "x.lmdb").read_bytes()
    with pytest.raises(InputError, match="is not an LMDB in DMD2's layout that pipestill wrote"):
        export(make_dataset(tmp_path / "data", 30), tmp_path / "x.lmdb")
    assert (tmp_path / "x.lmdb").read_bytes() == before


def adm_model(path: Path, seed: int) -> Path:
    tensors = random_tensors(TINY, seed)
    layout = adm.infer(tensors, "here")
    card = ModelCard("teacher", 8, 3, tuple("abcd"), False, {"kind": "edm"})
    staging = path.with_name(f".{path.name}.partial")
    staging.mkdir()
    save_model(staging, card, adm.build(layout), {"ema": adm.to_diffusers(tensors, layout, "here")})
    return artifacts.publish(staging, path, Manifest("model", "convert", 1, {}, {}, describe_files(staging))).path


@pytest.mark.parametrize("name", ["edm.pt", "edm.safetensors"])
def test_weights_in_edms_names_are_replaced_and_those_of_others_are_not(tmp_path: Path, name: str) -> None:
    first, second = adm_model(tmp_path / "first", 1), adm_model(tmp_path / "second", 2)
    file = tmp_path / name
    to_edm(first, file)
    content = file.read_bytes()
    to_edm(second, file)
    read = load_file(file) if name.endswith("safetensors") else torch.load(file, weights_only=True)
    assert torch.equal(read["model.out_conv.weight"], random_tensors(TINY, 2)["out_conv.weight"])
    to_edm(first, file)
    assert file.read_bytes() == content
    if name == "edm.pt":
        torch.save(read, file)
    else:
        from safetensors.torch import save_file

        save_file(read, file)
    before = file.read_bytes()
    with pytest.raises(InputError, match="is not a file of weights in EDM's names that pipestill wrote"):
        to_edm(first, file)
    assert file.read_bytes() == before


def test_pictures_replace_earlier_ones_and_mix_with_none(tmp_path: Path) -> None:
    images = noise(6, 8, 1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2]).numpy()
    make_samples(tmp_path / "six", images, labels)
    make_samples(tmp_path / "two", images[:2], labels[:2])
    write_pngs(tmp_path / "six", tmp_path / "png")
    assert len([*(tmp_path / "png").rglob("*.png")]) == 6
    write_pngs(tmp_path / "two", tmp_path / "png")
    found = sorted(str(path.relative_to(tmp_path / "png")) for path in (tmp_path / "png").rglob("*.png"))
    assert found == ["across/seed0-000000.png", "down/seed0-000001.png"]
    (tmp_path / "png" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"png/mine\.txt was added or changed since pipestill wrote"):
        write_pngs(tmp_path / "six", tmp_path / "png")
    (tmp_path / "png" / "mine.txt").unlink()
    (tmp_path / "png" / found[0]).write_bytes(b"retouched")
    with pytest.raises(InputError, match=r"seed0-000000\.png was added or changed"):
        write_pngs(tmp_path / "six", tmp_path / "png")
    (tmp_path / "png" / found[0]).unlink()  # what is missing is no loss
    write_pngs(tmp_path / "six", tmp_path / "png")


def test_a_report_on_data_replaces_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--report", "page", "data.resolution=8", "data.color=rgb", "data.transform=none"]
    for each in (6, 9):
        class_folders(Path(f"photos-{each}"), each=each)
        here("dataset", "--check", f"photos-{each}", *words, runs=tmp_path / "runs")
        assert json.loads(Path("page/report.json").read_text())["images"] == 2 * each


METRICS = {"evaluations": 4, "guidance": 1.0, "images": 40, "seeds": 1, "fd_classifier": 1.0}


def test_metrics_of_a_run_and_of_the_floor_are_told_apart(tmp_path: Path) -> None:
    run, floor, other = tmp_path / "run.json", tmp_path / "floor.json", tmp_path / "other.json"
    outputs.write_file(run, outputs.METRICS, json.dumps(METRICS))
    outputs.write_file(floor, outputs.FLOOR, json.dumps(METRICS | {"evaluations": 0}))
    other.write_text(json.dumps({"evaluations": 4}))
    outputs.write_file(run, outputs.METRICS, json.dumps(METRICS | {"fd_classifier": 2.0}))
    assert json.loads(run.read_text())["fd_classifier"] == 2.0
    for kind, paths in ((outputs.METRICS, (floor, other)), (outputs.FLOOR, (run, other))):
        for path in paths:
            with pytest.raises(InputError, match="so it is not replaced"):
                kind.check(path)


def test_config_forces_parameters_alone(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = configure.render(configure.compose(), [])
    assert configure.write(path, text)
    path.write_text(text.partition("\n")[2].replace("seed: 0", "seed: 1", 1))  # edited, its head gone
    with pytest.raises(InputError, match="holds edits"):
        configure.write(path, text)
    assert configure.write(path, text, force=True)
    for content in (b"services: {web: {}}\n", b"\xff\xfe", b"just a text\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a file of parameters"):
            configure.write(path, text, force=True)
        assert path.read_bytes() == content


# --- whole or not at all -------------------------------------------------------------------------------------------


def test_a_failure_leaves_the_earlier_file_and_folder(tmp_path: Path) -> None:
    file, folder = tmp_path / "m.json", tmp_path / "png"
    outputs.write_file(file, outputs.METRICS, json.dumps(METRICS))
    with outputs.new_folder(folder, outputs.PNGS) as staging:
        (staging / "a.png").write_bytes(b"1")
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError), outputs.new_file(file, outputs.METRICS) as partial:
        partial.write_text("half")
        _ = 1 / 0
    full = outputs.new_folder(folder, outputs.PNGS)
    with pytest.raises(SurroundingsError, match="could not be written"), full as staging:
        (staging / "b.png").write_bytes(b"2")
        raise OSError(28, "No space left on device")
    assert snapshot(tmp_path) == before


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    for place, kind in ((tmp_path / "m.json", outputs.METRICS), (tmp_path / "png", outputs.PNGS)):
        opened = outputs.new_file(place, kind) if place.suffix else outputs.new_folder(place, kind)  # type: ignore[arg-type]
        with pytest.raises(InputError), opened as partial:
            if place.suffix:
                partial.write_text(json.dumps(METRICS))
                place.write_text("somebody's own")
            else:
                a_folder(place)
    assert snapshot(tmp_path) == {
        "m.json": (False, b"somebody's own"),
        "png": (False, True),
        "png/letter.txt": (False, b"dear"),
    }


def test_empty_places_are_free(tmp_path: Path) -> None:
    (tmp_path / "m.json").touch()
    (tmp_path / "png").mkdir()
    outputs.METRICS.check(tmp_path / "m.json")
    outputs.PNGS.check(tmp_path / "png")


def test_a_mark_says_what_an_artefact_may_not_replace(tmp_path: Path) -> None:
    with outputs.new_folder(tmp_path / "png", outputs.PNGS) as staging:
        (staging / "a.png").write_bytes(b"1")
    with pytest.raises(InputError, match="is a pictures artefact, a model would replace it"):
        artifacts.check_place(tmp_path / "png", "model", {})
    publish_dataset(tmp_path / "data", noise(4, 8, 1), *(torch.zeros(4).long().numpy(),) * 2, classes=("a",))
    with pytest.raises(InputError, match="holds dataset, not pictures"):
        outputs.PNGS.check(tmp_path / "data")
