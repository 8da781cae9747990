"""Which runs the small table shows, and who says so: the table, scripts/results.py, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from commands import write_params
from pipestill import cli
from pipestill.commands import doctor
from pipestill.errors import InputError
from pipestill.reporting.table import columns, results_table, strays

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import results

NAMED = ("floor", "student-4", "teacher-heun-79")
OTHERS = ("earlier-4", "other run")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose metrics are those of two of its runs, of the floor, and of an earlier experiment."""
    write_params(tmp_path / "params.yaml")
    (tmp_path / "metrics").mkdir()
    for place, name in enumerate((*NAMED, *OTHERS)):
        body = {"fd_classifier": 1.0 + place, "evaluations": 4 * place, "seconds_per_image": 0.001}
        (tmp_path / "metrics" / f"{name}.json").write_text(json.dumps(body))
    return tmp_path


def shown(folder: Path) -> list[str]:
    return columns(folder)[0][1]


def test_the_runs_of_the_params_beside_it_and_the_floor(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["real against real", "teacher-heun-79", "student-4"]
    said = "left out, for params.yaml does not name them: earlier-4, other run\n"
    assert shown(project / "metrics") == wanted
    assert capsys.readouterr().err == said
    monkeypatch.chdir(project / "metrics")
    assert shown(Path()) == wanted
    monkeypatch.chdir(project)
    capsys.readouterr()
    assert cli.main(["report", "--print-table", "metrics"]) == 0
    printed = capsys.readouterr()
    assert printed.err == said
    assert "earlier" not in printed.out
    assert printed.out == results_table(Path("metrics"))
    assert [line.split(" | ")[0] for line in results.results(project / "metrics").splitlines()[2:]] == [
        f"| {name}" for name in wanted
    ]


def test_nothing_is_said_where_nothing_is_left_out(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in OTHERS:
        (project / "metrics" / f"{name}.json").unlink()
    assert len(shown(project / "metrics")) == 3
    assert capsys.readouterr().err == ""


def test_without_params_beside_it_a_folder_shows_all(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").unlink()
    assert set(shown(project / "metrics")) == {"real against real", *NAMED[1:], *OTHERS}
    assert strays(project / "metrics") == []
    assert capsys.readouterr().err == ""


def test_a_folder_of_other_runs_alone_and_params_that_are_not_in_order(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMED:
        (project / "metrics" / f"{name}.json").unlink()
    with pytest.raises(InputError, match=r"holds no metrics of the runs that params\.yaml names"):
        columns(project / "metrics")
    page = project / "README.md"
    page.write_text(f"{results.BEFORE}\nkept\n{results.AFTER}\n")
    monkeypatch.setattr(sys, "argv", ["results.py", "--metrics", str(project / "metrics"), "--readme", str(page)])
    with pytest.raises(SystemExit, match=r"results\.py: .* holds no metrics of the runs"):
        results.main()
    assert "kept" in page.read_text()
    write_params(project / "params.yaml", **{"data.resolution": 1})
    with pytest.raises(InputError, match=r"params\.yaml: data\.resolution=1"):
        columns(project / "metrics")


def test_doctor_says_how_to_remove_them(project: Path) -> None:
    (line,) = doctor.metrics(project)
    assert line.state == "warn"
    assert line.text.endswith("does not name: metrics/earlier-4.json, metrics/other run.json: pipestill clean")
    for name in OTHERS:
        (project / "metrics" / f"{name}.json").unlink()
    assert list(doctor.metrics(project)) == []
    (project / "params.yaml").write_text("nonsense: 1\n")
    assert list(doctor.metrics(project)) == []
