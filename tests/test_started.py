"""A run uses the parameters that it started with; nothing is recorded under parameters that did not make it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from pipestill import cli, pipeline, started, tools
from pipestill.commands import record
from pipestill.errors import InputError, SurroundingsError
from pipestill.stages import sample
from workflow_project import TINY, Project, dvc_stages

SEEDS = "sampling.runs.student-4.seeds"
SAMPLES = "artifacts/samples/student-4"
EVALUATION = "artifacts/evaluations/student-4"
EDIT = """
import sys
from pathlib import Path
import yaml
body = yaml.safe_load(Path("params.yaml").read_text())
for name, value in zip(sys.argv[1::2], sys.argv[2::2]):
    node = body
    *parents, last = name.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = yaml.safe_load(value)
Path("params.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
"""
DURING = """
import subprocess, sys
from pipestill import cli
from pipestill.stages import sample
work = sample.main
def edited(options):
    subprocess.run([sys.executable, "edit.py", *WORDS], check=True)
    work(options)
sample.main = edited
sys.exit(cli.main(["sample", *sys.argv[1:]]))
"""


@pytest.fixture
def project(tiny: Project, tmp_path: Path) -> Project:
    """The finished tiny project, of which one run has to be sampled and evaluated again."""
    project = tiny.copy(tmp_path / "project")
    project.here("config", *TINY, f"{SEEDS}=[7]")
    (project.root / "edit.py").write_text(EDIT)
    return project


def edit(project: Project, *words: str) -> None:
    project.run("python", "edit.py", *words)


def edit_before_sampling(project: Project, *words: str) -> None:
    """Lets sampling's command edit params.yaml before it starts."""
    command = f"python edit.py {shlex.join(words)} && pipestill sample"
    project.edit("dvc.yaml", "pipestill sample --name", f"{command} --name")


def edit_during_sampling(project: Project, *words: str) -> None:
    """Lets sampling edit params.yaml once it has started."""
    (project.root / "during.py").write_text(DURING.replace("WORDS", repr(list(words))))
    project.edit("dvc.yaml", "pipestill sample --name", "python during.py --name")


def made_with(project: Project, folder: str) -> dict[str, object]:
    return dict(json.loads((project.root / folder / "manifest.json").read_text())["parameters"])


def recorded(project: Project, address: str) -> dict[str, object]:
    return dict(pipeline.recorded_parameters(project.root)[address])


def test_a_snakemake_run_keeps_the_parameters_that_it_started_with(project: Project) -> None:
    before = (project.root / "params.yaml").read_text()
    edit_before_sampling(project, SEEDS, "[8]", "evaluation.threads", "2", "operation.record", "true")
    said = project.snakemake(f"{EVALUATION}/manifest.json")
    assert made_with(project, SAMPLES)["seeds"] == [7]
    assert made_with(project, EVALUATION)["threads"] == 1
    assert (
        "params.yaml changed during this run, which kept the values that it started with: "
        "sampling.runs.student-4.seeds was [7], now [8]; evaluation.threads was 1, now 2: "
        "run snakemake again to apply them"
    ) in said
    assert "not recorded: sample@student-4: " in said
    assert "not recorded: evaluate@student-4: " in said
    assert recorded(project, "sample@student-4")["sampling.runs.student-4"]["seeds"] == [0]  # type: ignore[index]
    target = ("--cores", "1", f"{EVALUATION}/manifest.json")
    assert project.planned(*target).keys() == {"sample@student-4", "evaluate@student-4"}
    (project.root / "params.yaml").write_text(before)
    assert project.planned(*target) == {}
    said = project.here("record")
    assert " sample@student-4" in said
    assert "not recorded: sample" not in said


def test_under_dvc_a_later_stage_names_what_changed(project: Project) -> None:
    """Sampling itself ends well: what changed while it ran is another stage's."""
    edit_during_sampling(project, "evaluation.threads", "2", "operation.log_every", "7")
    old = recorded(project, "evaluate@student-4")
    said = project.run("dvc", "repro", "evaluate@student-4", code=255, fresh=True)
    assert "params.yaml changed while DVC was running (evaluation.threads was 1, now 2). Restore the old" in said
    assert "operation.log_every" not in said
    assert recorded(project, "sample@student-4")["sampling.runs.student-4"]["seeds"] == [7]  # type: ignore[index]
    assert recorded(project, "evaluate@student-4") == old
    project.git("checkout", "--", "dvc.yaml")
    project.dvc("repro", "evaluate@student-4")  # a new run takes the new value
    assert made_with(project, EVALUATION)["threads"] == 2


def test_a_stage_of_dvc_whose_parameters_were_edited_ends_with_2_and_names_them(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own command, under the variables that DVC and `pipestill repro` set: before it starts, and while it works."""
    before, after = project.root / "before.yaml", project.root / "params.yaml"
    shutil.copy(after, before)
    said = "params.yaml changed while DVC was running ({} was {}, now {})."
    again = "or run dvc repro again to use the new one.\n"
    edit(project, SEEDS, "[8]", "evaluation.threads", "2")
    changes = {"sample": said.format(SEEDS, "[7]", "[8]"), "evaluate": said.format("evaluation.threads", "1", "2")}
    stages = dvc_stages(project.root)
    words = {stage: shlex.split(str(stages[f"{stage}@student-4"]["command"]))[1:] for stage in changes}
    for stage, change in changes.items():
        variables = {"DVC_STAGE": f"{stage}@student-4", "PIPESTILL_PARAMS": str(before)}
        printed = project.pipestill(*words[stage], code=2, **variables)
        assert printed == f"pipestill {stage}: {change} Restore the old value, {again}"
    assert made_with(project, SAMPLES)["seeds"] == [0]

    shutil.copy(before, after)
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("DVC_STAGE", "sample@student-4")
    monkeypatch.setenv("PIPESTILL_PARAMS", str(before))
    monkeypatch.setattr(sample, "main", lambda options: edit(project, SEEDS, "[8]"))
    assert cli.main(words["sample"]) == 2
    kept = "To keep this result, restore the old value and run pipestill record, "
    assert capsys.readouterr().err == f"pipestill sample: {changes['sample']} {kept}{again}"


def test_dvc_records_nothing_under_parameters_that_were_edited_while_it_ran(project: Project) -> None:
    edit_during_sampling(project, SEEDS, "[8]", "sampling.runs.student-4.micro_batch", "3")
    old = recorded(project, "sample@student-4")
    said = project.run("dvc", "repro", "sample@student-4", code=255, fresh=True)
    assert "sampling.runs.student-4.seeds was [7], now [8]; sampling.runs.student-4.micro_batch was" in said
    assert "To keep this result, restore the old value and run pipestill record" in said
    assert made_with(project, SAMPLES)["seeds"] == [7]
    assert recorded(project, "sample@student-4") == old
    project.here("config", "--force", *TINY, f"{SEEDS}=[7]")
    project.git("checkout", "--", "dvc.yaml")
    assert "recorded 1: sample@student-4" in project.here("record")


def test_all_attempts_of_repro_are_one_run(project: Project) -> None:
    """The first attempt stops with its state saved; what was edited before the second is not taken up."""
    edits = f"python edit.py {SEEDS} [8]"
    stops = f"[ -e stopped ] || {{ touch stopped $PIPESTILL_STOPPED; {edits}; exit 75; }}"
    project.edit("dvc.yaml", "cmd: >-\n        pipestill sample", f"cmd: >-\n        {stops}; pipestill sample")
    said = project.pipestill("repro", "sample@student-4", code=3)
    assert "goes on from there" in said
    assert f"{SEEDS} was [7], now [8]" in said


def test_record_keeps_dvc_lock_if_parameters_change_meanwhile(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.by_hand_here("sample@student-4", "evaluate@student-4")
    lock = (project.root / "dvc.lock").read_bytes()
    commit = tools.dvc

    def edited(root: Path, *arguments: str) -> None:
        edit(project, SEEDS, "[8]")
        commit(root, *arguments)

    monkeypatch.setattr(tools, "dvc", edited)
    with pytest.raises(SurroundingsError, match="changed while DVC was recording"):
        record.record(pipeline.load(project.root))
    assert (project.root / "dvc.lock").read_bytes() == lock


def test_a_commit_that_ends_midway_leaves_nothing_unverified(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage is committed under an edited parameter; what another process records meanwhile stays."""
    project.by_hand_here("sample@student-4", "evaluate@student-4")
    commit, old = tools.dvc, pipeline.recorded(project.root)

    def interrupted(root: Path, *arguments: str) -> None:
        edit(project, SEEDS, "[8]", "report.title", "Another")
        commit(root, "commit", "--force", "sample@student-4", "report")  # the report by somebody else
        raise KeyboardInterrupt

    monkeypatch.setattr(tools, "dvc", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tools.commit(pipeline.load(project.root), ["sample@student-4", "evaluate@student-4"])
    new = pipeline.recorded(project.root)
    assert [address for address in new if new[address] != old[address]] == ["report"]
    assert list(new) == list(old)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "params.yaml cannot be read (No such file or directory)"),
        (b"\xff", "params.yaml cannot be read (it is not UTF-8 text)"),
        (b"a: [", "params.yaml, line 2: "),
        (b"[1]\n", "params.yaml holds no parameters"),
    ],
)
def test_parameters_that_can_no_longer_be_read_are_one_line(
    content: bytes | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        started.FILE.write_bytes(content + b"\n" * (content == b"a: ["))
    with pytest.raises(InputError) as caught:
        started.Held(("data",), {"data": 1}).check()
    assert str(caught.value).startswith(says)


def test_repro_says_what_is_wrong_with_params_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    started.FILE.write_bytes(b"\xff")
    assert cli.main(["repro"]) == 2
    assert "params.yaml cannot be read (it is not UTF-8 text)" in capsys.readouterr().err


def test_the_report_is_not_signed_under_parameters_of_models_that_are_not_there(tiny: Project, tmp_path: Path) -> None:
    project = tiny.copy(tmp_path / "project")
    project.here("config", *TINY, "sampling.runs.more={model: teacher, sampler: euler, steps: 2}")
    assert "not recorded: report: sample@more is not up to date" in project.here("record")
    assert "sampling.runs" in recorded(project, "report")
    assert "more" not in recorded(project, "report")["sampling.runs"]  # type: ignore[operator]


def test_differences_name_both_values() -> None:
    before = yaml.safe_load("{a: {b: 1, c: [1, 2], d: x}, e: 1.0, f: null}")
    after = yaml.safe_load("{a: {b: 2, c: [1, 2]}, e: 1.0, f: 0, g: {h: 1}}")
    found = list(started.differences(before, after))
    assert found == ["a.b was 1, now 2", 'a.d was "x", now not set', "f was null, now 0", "g was not set, now set"]
    assert started.listed(["1", "2", "3", "4", "5", "6"]) == "1; 2; 3; 4; and 2 more"


def test_what_dvc_tracks_is_read_from_its_definition(tiny: Project) -> None:
    definition = tiny.root / "dvc.yaml"
    assert started.tracked(definition, "train@teacher") == ("teachers.teacher",)
    assert started.tracked(definition, "dataset") == ("data",)
    models = ("converted", "teachers", "distillation.students")
    assert started.tracked(definition, "report") == ("report", *models, "sampling.runs")
