"""A stop signal anywhere in a command: exit 75 within seconds, one line, and the next start makes the same bytes."""

from __future__ import annotations

import hashlib
import http.server
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import forked
from commands import Command, payload, run, write_params
from pipestill.errors import Stopped
from pipestill.stopping import STOP_SIGNALS, StopRequest, handlers_kept
from workflow_project import Project, dvc_stages

SECONDS = 60.0  # for a command that takes one or two of its own, on a busy machine
# What a command calls again and again while it works, and at which call the signal comes. `signal_at.py` sends it
# from within that call, so that each test stops at the same place each time.
STEPS = {
    "example@digits": ("PIL.Image.Image.save", 700),
    "dataset": ("pipestill.data.ingest._Journal.add", 5),
    "reference": ("pipestill.evaluation.classifier.Classifier.forward", 11),
    "train@teacher": ("pipestill.training.teacher.TeacherTraining.update", 5),
    "tune@teacher": ("pipestill.sampling.tuning.to_uint8", 1),
    "distill@student-4": ("pipestill.distillation.dmd2.Distillation.update", 2),
    "sample@student-4": ("pipestill.sampling.runner._share", 1),
    "evaluate@student-4": ("pipestill.evaluation.measure.measure", 1),
    "report": ("pipestill.reporting.grids.tile", 2),
}
# and where no loop asks, so that the signal interrupts
BETWEEN = {
    "dataset": ("os.scandir", 2),
    "reference": ("pipestill.evaluation.measure.drawn_rows", 2),
    "train@teacher": ("pipestill.networks.model.save_model", 1),
    "distill@student-4": ("pipestill.networks.model.load_model", 1),
    "sample@student-4": ("pipestill.artifacts.describe_files", 1),
    "report": ("pipestill.reporting.page.render", 1),
}


def stopped_at(place: tuple[str, int], number: signal.Signals, folder: Path, *words: str) -> str:
    """What a `pipestill` command prints that sends itself a signal, and must end with 75."""
    program = str(Path(__file__).with_name("signal_at.py"))
    arguments = [*map(str, place), str(int(number)), *words]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIPESTILL_")}
    log = folder / "stopped.log"
    with log.open("wb") as output:
        process = forked.start(program, arguments, variables, output=output, folder=folder) or subprocess.Popen(
            [sys.executable, "-P", program, *arguments], cwd=folder, env=variables, stdout=output, stderr=output
        )
        code = process.wait(SECONDS)
    said = log.read_text()
    log.unlink()
    assert code == 75, said
    assert "Traceback" not in said
    assert number.name in said.splitlines()[-1]
    return said


@pytest.fixture(scope="module")
def project(tiny: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished pipeline, of which each test removes and makes one artefact."""
    return tiny.copy(tmp_path_factory.mktemp("stops") / "project")


def stops_and_goes_on(
    project: Project, address: str, place: tuple[str, int], number: signal.Signals, *, again: bool
) -> None:
    stage = dvc_stages(project.root)[address]
    words = shlex.split(str(stage["command"]))[1:]
    artefact = project.root / words[words.index("--output") + 1]
    shutil.rmtree(project.root / "runs", ignore_errors=True)
    whole, kept = payload(artefact), artefact.with_name("kept")
    artefact.rename(kept)
    try:
        stopped_at(place, number, project.root, *words)
        assert not artefact.exists()
        if again:
            project.here(*words)
            assert payload(artefact) == whole
    finally:
        shutil.rmtree(artefact, ignore_errors=True)
        kept.rename(artefact)  # for the tests that come


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("address", STEPS)
def test_a_stage_stops_at_its_step_and_goes_on(project: Project, address: str, number: signal.Signals) -> None:
    stops_and_goes_on(project, address, STEPS[address], number, again=number == signal.SIGTERM)


@pytest.mark.parametrize("address", BETWEEN)
def test_a_stage_is_interrupted_where_no_loop_asks_and_goes_on(project: Project, address: str) -> None:
    stops_and_goes_on(project, address, BETWEEN[address], signal.SIGTERM, again=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_hangs_in_a_read_holds_up_nothing(project: Project, number: signal.Signals) -> None:
    """The fortieth image that a worker decodes sends the signal to the main process and never comes back."""
    words = ("dataset", "--output", "elsewhere", "operation.workers=2")
    said = stopped_at(("pipestill.data.ingest.prepare", 40), number, project.root, *words)
    assert "start it again" in said
    project.here(*words)
    assert payload(project.root / "elsewhere") == payload(project.root / "artifacts" / "dataset")
    shutil.rmtree(project.root / "elsewhere")


def test_a_server_that_stops_sending_holds_up_nothing(tmp_path: Path) -> None:
    content, asked = bytes(range(256)) * 8192, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            asked.append(first)
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(content) - first))
            self.send_header("ETag", '"one"')
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if len(asked) > 1:
                self.wfile.write(content[first:])
                return
            self.wfile.write(content[: 3 << 19])
            self.wfile.flush()
            part = tmp_path / "runs"
            assert command.wait_until(lambda: any(file.stat().st_size >= 1 << 20 for file in part.rglob("*.bin")))
            command.process.send_signal(signal.SIGTERM)
            released.wait(SECONDS)

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    released = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/a.bin"
    file = {"path": "a.bin", "source": "https", "location": address, "sha256": hashlib.sha256(content).hexdigest()}
    params = write_params(tmp_path / "params.yaml", fetched={"a": {"files": [file]}})
    words = ("fetch", "--name", "a", "--output", tmp_path / "fetched", "--params", params)
    command = Command(*words, runs=tmp_path / "runs")
    try:
        assert command.wait() == 75, command.output
    finally:
        released.set()
    code, output = run(*words, runs=tmp_path / "runs")
    assert code == 0, output
    assert (tmp_path / "fetched" / "a.bin").read_bytes() == content
    assert asked[1] >= 1 << 20  # it went on where it had stopped
    server.shutdown()


def test_a_caller_of_the_functions_has_all_its_handlers_back() -> None:
    heard: list[int] = []

    def own(number: int, frame: object) -> None:
        heard.append(number)

    with handlers_kept():
        for number in STOP_SIGNALS:
            signal.signal(number, own)
        with StopRequest().listening():
            assert signal.getsignal(signal.SIGTERM) != own
        with pytest.raises(Stopped), StopRequest().listening():
            signal.raise_signal(signal.SIGTERM)
        for number in STOP_SIGNALS:
            signal.raise_signal(number)
    assert heard == list(STOP_SIGNALS)


def test_a_command_that_was_stopped_does_not_hear_it_again() -> None:
    """A launcher repeats its SIGTERM while the outcome is being left."""
    with handlers_kept():
        with (
            pytest.raises(Stopped, match="the inner"),
            StopRequest().listening(leave=lambda reason: None),
        ):
            try:
                with StopRequest().listening():
                    signal.raise_signal(signal.SIGTERM)
            except Stopped:
                signal.raise_signal(signal.SIGTERM)
                raise Stopped("the inner") from None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR2)


@pytest.mark.parametrize("module", ["pydantic", "torch"])
def test_a_signal_during_imports_is_a_stop_without_a_traceback(tmp_path: Path, digits: Path, module: str) -> None:
    """A new interpreter, which sends itself the signal where it begins to import a module."""
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
"""
    )
    words = ("reference", "--dataset", digits, "--output", tmp_path / "reference")
    code, output = run(*words, runs=tmp_path / "runs", environment={"PYTHONPATH": str(tmp_path)}, fresh=True)
    assert code == 75, output
    assert output in (f"pipestill{stage}: stopped by SIGTERM: start it again\n" for stage in ("", " reference"))
