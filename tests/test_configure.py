"""Composing conf/ into params.yaml: what is filled in, what is refused and how, and edits that survive."""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipestill import cli, config, configure, parameter_docs
from pipestill.errors import InputError
from pipestill.stages.common import load_params
from pipestill.training.ema import warnings

ROOT = Path(__file__).parent.parent
DIGITS = ("digits", "digits_long")
EXPERIMENTS = sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))


def written(tmp_path: Path, *overrides: str) -> Path:
    path = tmp_path / "params.yaml"
    assert cli.main(["config", "--output", str(path), *overrides]) == 0
    return path


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(["config", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, f"one line was promised: {error}"
    return error


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_survives_a_round_trip(experiment: str, tmp_path: Path) -> None:
    more = ["data.path=images"] if experiment == "own" else []
    path = written(tmp_path, f"experiment={experiment}", *more)
    assert config.load(path) == configure.compose([f"experiment={experiment}", *more])
    assert yaml.safe_load(path.read_text()) == config.load(path).plain()  # plain YAML 1.1 readers see the same values


@functools.cache
def composed(experiment: str) -> config.Params:
    return configure.compose([f"experiment={experiment}", *(["data.path=images"] if experiment == "own" else [])])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_values_that_one_dataset_needs_stay_in_its_experiment(experiment: str) -> None:
    """Distribution matching uses the whole ladder, except on digits; teachers measure sigma_data; averages forget."""
    params = composed(experiment)
    for name, student in params.distillation.students.items():
        digits = experiment in DIGITS and not name.startswith("published")
        assert (student.dm.sigma_min, student.dm.sigma_max) == (0.3 if digits else 0.002, 80.0), name
        assert not warnings(student.ema, updates=student.iterations, batch=student.batch), name
    for name, teacher in params.teachers.items():
        assert getattr(teacher.denoiser, "sigma_data", "data") == "data", name
        training = teacher.training
        assert not warnings(training.ema, updates=training.iterations, batch=training.batch), name
    assert all(model.denoiser.sigma_data == 0.5 for model in params.converted.values())


def numbers_in(node: object, name: str = "") -> set[tuple[str, float]]:
    """Every number below a node, with its full name."""
    if isinstance(node, dict):
        return set().union(*(numbers_in(value, f"{name}.{key}".lstrip(".")) for key, value in node.items()))
    return {(name, float(node))} if isinstance(node, (int, float)) and not isinstance(node, bool) else set()


def numbers_stated(*files: str) -> set[tuple[str, float]]:
    """What files of conf/ state for students, the published recipe on digits aside, each by its name in a student."""
    found = set[tuple[str, float]]()
    for file in files:
        body = config.parse_yaml((ROOT / "conf" / f"{file}.yaml").read_text(), file)
        section = body if file.startswith("distillation/") else body.get("distillation", {})
        students = {name: entry for name, entry in section.get("students", {}).items() if "published" not in name}
        found = found.union(*map(numbers_in, (section.get("shared", {}), *students.values())))
    return {(name, value) for name, value in found if name not in ("steps", "seed", "optimizer.decay_from")}


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in DIGITS])
def test_no_value_of_the_digits_students_is_inherited_by_others(experiment: str) -> None:
    """Rates, lengths, loss weights and noise levels: whoever shares one states it."""
    trials = ("generator_lr", "fake_score_lr", "iterations", "dm.sigma_min")  # chosen on digits (docs/quality.md)
    of_digits = numbers_stated(*(f"experiment/{name}" for name in DIGITS))
    for student in composed("digits").distillation.students.values():
        of_digits |= {(name, value) for name, value in numbers_in(student.plain()) if name in trials}
    assert {("dm.sigma_min", 0.3), ("generator_lr", 5e-5), ("iterations", 400.0), ("sigma_max", 20.0)} <= of_digits

    group = ["distillation/dmd2_imagenet64"] if experiment.startswith(("imagenet64", "rehearsal")) else []
    above = {"dtd_filtered": ["experiment/dtd"]}.get(experiment, [])
    own = numbers_stated(f"experiment/{experiment}", *above, *group)
    students = composed(experiment).distillation.students.values()
    found = set().union(*(numbers_in(student.plain()) for student in students))
    assert found & of_digits <= own


def test_own_images_are_trained_with_the_values_that_own_states() -> None:
    params = composed("own")
    training = params.teachers["teacher"].training
    assert (training.iterations, training.batch, training.learning_rate) == (1800, 64, 2e-3)
    for steps, student in zip((10, 4), params.distillation.students.values(), strict=True):
        assert (student.steps, student.iterations, student.batch, student.update_ratio) == (steps, 120, 64, 2)
        assert (student.generator_lr, student.fake_score_lr, student.ema.decay) == (1e-4, 3e-4, 0.995)
        assert (student.sigma_max, student.sigma_min, student.dm.weight) == (8.0, 0.05, 1.0)
        assert not student.gan.on


@pytest.mark.parametrize("value", ["date", "0", "-1", "null", "1e9"])
def test_sigma_data_is_a_number_or_measured(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = message(capsys, "experiment=digits", f"teachers.teacher.denoiser.sigma_data={value}")
    assert "teachers.teacher.denoiser.sigma_data: " in said
    assert "is neither a number above 0 nor 'data'" in said


def test_committed_parameters_are_the_digits_demo(tmp_path: Path) -> None:
    assert written(tmp_path, "experiment=digits").read_text() == (ROOT / "params.yaml").read_text()


def test_the_demo_names_the_promised_runs() -> None:
    params = configure.compose(["experiment=digits"])
    assert set(params.sampling.runs) == {
        *("teacher-heun-79", "teacher-heun-9", "teacher-euler-10", "teacher-renoise-10", "teacher-euler-4"),
        *("teacher-renoise-4", "teacher-2m-10", "teacher-2m-4", "student-10", "student-10-cfg15", "student-4"),
    }
    assert {run.images for run in params.sampling.runs.values()} == {500}
    assert params.sampling.runs["student-10-cfg15"].guidance == 1.5


def test_shared_settings_reach_every_entry_and_own_ones_win() -> None:
    params = configure.compose(
        [
            "experiment=digits_long",
            "distillation.shared.generator_lr=3e-5",
            "distillation.students.student-4-b.generator_lr=2e-5",
            "distillation.students.student-4-a.batch=64",
            "network.layers=3",
        ]
    )
    students = params.distillation.students
    assert students["student-4-a"].generator_lr == 3e-5
    assert students["student-4-b"].generator_lr == 2e-5
    assert students["student-4-b"].batch == students["student-4-c"].batch == 64  # through `like`
    assert (students["student-4-b"].seed, students["student-4-c"].seed) == (1, 2)
    assert students["published-4-c"].transition == "renoise"
    assert params.teachers["teacher"].network.layers == 3


def test_what_follows_from_the_runs_is_derived() -> None:
    body = {
        "data": {"path": "x", "resolution": 8},
        "teachers": {"t": None},
        "distillation": {"students": {"s": {"teacher": "t", "steps": 2}}},
        "tuning": {"images": 7},
        "sampling": {
            "shared": {"images": 30},
            "runs": {
                "a": {"model": "t", "sampler": "2m", "steps": 4, "sigmas": "tuned/t"},
                "b": {"like": "a", "guidance": 2.0, "images": 20},
                "c": {"model": "t", "sampler": "euler", "steps": 4, "sigmas": "tuned/t"},
                "d": {"model": "s"},
            },
        },
    }
    params = config.check(configure.expand(body))
    assert params.reference.floor.counts == (20, 30)
    assert [(solver.sampler, solver.steps) for solver in params.tune["t"].solvers] == [("2m", 4), ("euler", 4)]
    assert params.tune["t"].images == 7
    assert params.sampling.runs["d"].sigmas == "models/s"
    assert params.distillation.students["s"].init == "t"
    assert (params.sampling.runs["b"].steps, params.sampling.runs["b"].images) == (4, 20)


def test_class_mixes_follow_the_runs() -> None:
    own = configure.compose(["experiment=own", "data.path=images"])
    assert {run.plan for run in own.sampling.runs.values()} == {"data"}
    assert own.reference.floor.plans == ("data",)
    assert {student.plan for student in own.distillation.students.values()} == {own.tune["teacher"].plan} == {"data"}
    mixed = configure.compose(
        [
            "experiment=digits",
            "sampling.runs.student-4.plan=data",
            "tuning.plan=data",
            "sampling.runs.student-10.plan=drawn",
        ]
    )
    assert mixed.reference.floor.plans == ("balanced", "data")
    assert {name: student.plan for name, student in mixed.distillation.students.items()} == {
        "student-10": "balanced",
        "student-4": "data",
    }
    assert mixed.tune["teacher"].plan == "data"
    published = configure.compose(["experiment=imagenet64_dmd2_1step"])
    assert {student.gan.real for student in published.distillation.students.values()} == {"data"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("experiment=digit", "did you mean 'digits'?"),
        ("distillation.students.student-10.generatr_lr=1", "student-10.generatr_lr is not known; did you mean"),
        ("distillation.students.student-4.generator_lr=4", "generator_lr=4: input should be less than or equal to 1"),
        ("teachers.teacher.training.iterations=0", "iterations=0: input should be greater than or equal to 1"),
        ("dat.path=x", "dat is not known; did you mean 'data'?"),
        ("netwrk=tiny", "netwrk is neither a group nor a section; did you mean 'network'?"),
        ("sampling.runs.student-10.model=student-11", "'student-11' is no model; did you mean 'student-10'?"),
        ("sampling.runs.Bad.model=teacher", "sampling.runs.Bad"),
        ("sampling.runs.floor.model=teacher", "'floor' names the real-against-real figures"),
        ("data.resolution=[", """as text write 'data.resolution="["'"""),
        ("+data.resolution=8", "'+data.resolution=8' is not KEY=VALUE"),
        ("network.channels=64", "network.channels=64: a list is expected, write network.channels=[64]"),
        ("network.layers=true", "network.layers: true or false is not expected here"),
        ("network.layers=null", "network.layers=null: input should be a valid integer"),
        ("network=tny", "network=tny: there is no such choice; did you mean 'tiny'?"),
        ("network.layers.x=1", "network.layers.x: 'layers' has no parameters below it"),
        ("data=3", "data=3: there is no such choice"),
        ("report=3", "report=3: it has parameters of its own, write report.NAME=VALUE"),
        ("report.title=3", "report.title=3: text is expected, put it in quotes"),
        ("data.path='~'", "~ alone is not expanded: write ~/ or the whole path"),
        ("data.path=", "data.path=: string should have at least 1 character"),
        ("~sampling.runs.student-5", "~sampling.runs.student-5: there is no 'student-5'; did you mean 'student-4'?"),
        ("sampling.shared.seeds=[0, 1, 0]", "sampling.shared.seeds: 0 is there twice"),
        ("tuning.sigma_max=[8.0, 80, 80.0]", "tuning.sigma_max: 80.0 is there twice"),
        ("tuning.sigma_min=[.nan]", "tuning.sigma_min.0=nan: input should be a finite number"),
        ("training.learning_rate=.inf", "training.learning_rate=inf: input should be"),
        ("reference.floor.counts=[500, 500]", "reference.floor.counts: 500 is there twice"),
        ("reference.protocol.extractors=[classifier, classifier]", "extractors: classifier is there twice"),
        ("operation.preview.classes=[a, a]", "operation.preview.classes: a is there twice"),
        ("operation.trackers=[wandb, wandb]", "operation.trackers: wandb is there twice"),
        ("experiment=own", "data.path has no value yet"),
        ("distillation.students.student-4.like=student-5", "did you mean 'student-4'?"),
        ("distillation.students.student-4.like=student-4", "goes round in a circle"),
        (
            "teachers.teacher.denoiser={kind: vp, predictoin: epsilon}",
            "teachers.teacher.denoiser.predictoin is not known; did you mean 'prediction'?",
        ),
        ("teachers.teacher.denoiser={kind: vq}", "teachers.teacher.denoiser.kind='vq': one of 'edm', 'vp', 'flow' was"),
        (
            "teachers.teacher.denoiser={kind: vp, zero_terminal_snr: true}",
            "teachers.teacher.denoiser: zero_terminal_snr needs prediction=v_prediction",
        ),
        (
            "teachers.teacher.denoiser={kind: vp, steps: 1}",
            "denoiser.steps=1: input should be greater than or equal to",
        ),
        ("distillation.students.student-4.spacing=trailing", "set sigma_max and sigma_min to null"),
        ("sampling.runs.student-4.spacing=trailing", "sampler=native has noise levels of its own"),
        ("teachers.a.start=models/a", "teachers.a.start goes round in a circle: a -> a"),
    ],
)
def test_wrong_overrides_are_named_in_one_line(
    override: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "params.yaml"
    assert says in message(capsys, "--output", str(path), override)
    assert not path.exists()


def test_an_unknown_name_is_reported_before_a_missing_value(capsys: pytest.CaptureFixture[str]) -> None:
    said = message(capsys, "--print", "experiment=own", "data.pth=photos")
    assert said == "pipestill config: parameters: data.pth is not known; did you mean 'path'?\n"
    with pytest.raises(InputError, match=r"^x: data\.pth is not known; did you mean 'path'\?; data\.path is missing$"):
        config.check({"data": {"pth": "x", "resolution": 8}, "teachers": {}}, "x")


def test_a_mistake_in_what_entries_share_is_reported_once_and_where_it_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = message(capsys, "--print", "sampling.shared.micro_batch=0", "sampling.runs.student-4.rho=0")
    assert said.count("micro_batch") == 1
    assert "sampling.shared.micro_batch=0: input should be" in said
    assert "sampling.runs.student-4.rho=0: input should be" in said


def test_composing_removes_entries(tmp_path: Path) -> None:
    path = written(tmp_path, "experiment=digits", "~sampling.runs.student-10-cfg15")
    whole, found = configure.compose(["experiment=digits"]).sampling.runs, config.load(path).sampling.runs
    assert [*found] == [name for name in whole if name != "student-10-cfg15"]


def test_edits_by_hand_are_kept_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    written(tmp_path, "training.iterations=50")  # its own writing may be replaced
    edit = path.read_text().replace("iterations: 50\n", "iterations: 51\n")
    path.write_text(edit)
    assert "edits that pipestill config did not make" in message(capsys, "--output", str(path))
    assert path.read_text() == edit
    assert config.load(path).teachers["teacher"].training.iterations == 51
    assert cli.main(["config", "--output", str(path), "--force"]) == 0
    assert config.load(path).teachers["teacher"].training.iterations == 2000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--estimate", "training.iterations=5"), "--estimate takes no training.iterations=5: write params.yaml"),
        (("--schema", "experiment=own"), "--schema takes no experiment=own"),
        (("--docs", "--output", "x.md"), "--docs writes and reads no x.md: leave --output out"),
        (("--print", "--output", "x.yaml"), "--print writes and reads no x.yaml: leave --output out"),
        (("--estimate", "--output", "x.yaml"), "--estimate writes and reads no x.yaml: leave --output out"),
        (("--check", "--force"), "--check writes nothing: leave --force out"),
    ],
)
def test_words_that_would_change_nothing_are_refused(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in message(capsys, *words)


def test_true_is_no_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    error = message(capsys, "--print", "operation.ranks={train: true}")
    assert "operation.ranks" in error
    assert "true or false is not expected here" in error


def test_an_experiment_is_not_replaced_by_a_command_that_names_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "experiment=miniature")
    before = path.read_text()
    assert "was written with experiment=miniature" in message(capsys, "--output", str(path), "report.title=Mine")
    assert path.read_text() == before
    written(tmp_path, "experiment=miniature", "report.title=Mine")
    assert config.load(path).report.title == "Mine"
    assert cli.main(["config", "--output", str(path), "--force", "report.title=Demo"]) == 0
    assert "student-10-cfg15" in config.load(path).sampling.runs


def test_a_file_of_another_origin_counts_as_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("data: {path: mine, resolution: 8}\nteachers: {}\n")
    assert "--force" in message(capsys, "--output", str(path))
    assert path.read_text().startswith("data: {path: mine")


def test_parameter_files_are_checked_where_they_are_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace("learning_rate: 0.002", "learning_rte: 0.002"))
    with pytest.raises(InputError, match=r"params\.yaml: .*learning_rte is not known; did you mean 'learning_rate'"):
        config.load(path)


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("training.iterations=5", "teachers.NAME.training"),
        ("sampling.shared.images=5", "sampling.runs.NAME"),
        ("distillation.shared.batch=5", "distillation.students.NAME"),
    ],
)
def test_shared_settings_are_led_to_their_place_in_a_parameter_file(tmp_path: Path, override: str, place: str) -> None:
    with pytest.raises(InputError, match=rf"{override.rpartition('.')[0]} is shared by several .* {place}$"):
        config.load(written(tmp_path), [override])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampling.runs.student-4.images=40", "student-4.images: 40 is not among reference.floor.counts [500]"),
        ("sampling.runs.teacher-heun-9.steps=6", "heun at 6 steps is not in tune.teacher.solvers"),
        ("tune.teacher.solvers=[{sampler: 2m, steps: 8}]", "is not in tune.teacher.solvers"),
        ("sampling.runs.student-4.plan=data", "plan=data needs a floor of plan data, which is not among"),
        ("data.labels=false", "data.labels=false leaves no classes"),
        ("data.resolution=33", "and 33 pixels cannot be"),
        ("distillation.students.student-4.teacher=mine", "'mine' is no teacher"),
    ],
)
def test_what_sections_ask_of_each_other_is_checked_for_a_pipeline_but_not_for_one_stage(
    override: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    options = argparse.Namespace(params=path, overrides=[override])
    assert load_params(options) == config.load(path, [override])
    assert says in message(capsys, "--check", "--output", str(path), override)
    monkeypatch.setenv("DVC_STAGE", "sample@student-4")  # as DVC runs its stages
    with pytest.raises(InputError, match=re.escape(says)):
        load_params(options)


def test_without_params_yaml_a_stage_takes_the_packaged_demo(tmp_path: Path) -> None:
    script = (
        "import argparse; from pipestill.stages import common\n"
        "options = argparse.Namespace(params=None, overrides=['data.resolution=16'])\n"
        "params = common.load_params(options); print(params.data.path, params.data.resolution)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "data/digits/images 16\n"


def test_without_params_yaml_a_stage_only_needs_its_own_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = argparse.Namespace(params=None, overrides=["experiment=own", "distillation.shared.batch=7"])
    assert load_params(options).distillation.students["student-4"].batch == 7
    with pytest.raises(InputError, match=r"data\.path has no value yet"):
        load_params(options, "data")


def test_documentation_and_schema_are_current() -> None:
    assert (ROOT / "docs" / "parameters.md").read_text() == parameter_docs.page(), "run make generated"
    schema = ROOT / "workflow" / "schemas" / "params.schema.json"
    assert schema.read_text() == configure.schema(), "run make generated"
