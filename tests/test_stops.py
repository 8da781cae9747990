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
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import forked
from commands import Command, payload, run, write_params
from edm_files import TINY as ADM
from edm_files import random_tensors, write_edm_pickle
from pipestill.errors import Stopped
from pipestill.stopping import DEADLINE, STOP_SIGNALS, StopRequest, handlers_kept
from signal_at import AGAIN, SENT
from workflow_project import TINY, Project, dvc_stages

SECONDS = 60.0  # for a command that takes one or two of its own, on a busy machine
WITHIN = 20.0  # seconds from the signal to the end, on a busy machine too


@dataclass(frozen=True)
class Step:
    """What a command calls again and again while it works, and at which call the signal comes.

    `signal_at.py` sends it from within that call, so that each test stops at the same place each time.
    """

    function: str
    call: int
    more: int = 0  # further calls before the command ends, at most
    keeps: str | None = None  # what the stage leaves in its state, a pattern
    says: str = ""  # what the next start says


STEPS = {
    "example@digits": Step("PIL.Image.Image.save", 700),
    "dataset": Step("pipestill.data.ingest._Journal.add", 5, keeps="*"),
    "reference": Step(
        "pipestill.evaluation.classifier.Classifier.forward",
        11,
        keeps="classifier-training.pt",
        says="the classifier goes on after update 11 of 30",
    ),
    "train@teacher": Step(
        "pipestill.training.teacher.TeacherTraining.update",
        5,
        keeps="state-000000005.pt",
        says="going on after update 5 of 12",
    ),
    "tune@teacher": Step(
        "pipestill.sampling.tuning.to_uint8",
        1,
        keeps="candidates/*.json",
        says="going on: 1 of 2 candidates are measured",
    ),
    "distill@student-4": Step(
        "pipestill.distillation.dmd2.Distillation.update",
        2,
        keeps="state-000000002.pt",
        says="going on after update 2 of 4",
    ),
    "sample@student-4": Step("pipestill.sampling.writer.BlockWriter.put", 1, keeps="**/*.npy"),
    "evaluate@student-4": Step("pipestill.evaluation.tables._write_rows", 1, more=1, keeps="samples.done-0"),
    "report": Step("pipestill.reporting.grids.tile", 2),
}
# the last step of a loop, after which nothing asks as a matter of course
LAST = {
    "train@teacher": Step(
        "pipestill.training.teacher.TeacherTraining.update",
        12,
        keeps="state-000000012.pt",
        says="going on after update 12 of 12",
    ),
    "tune@teacher": Step(
        "pipestill.sampling.tuning.to_uint8",
        2,
        keeps="candidates/*.json",
        says="going on: 2 of 2 candidates are measured",
    ),
    "distill@student-4": Step(
        "pipestill.distillation.dmd2.Distillation.update",
        4,
        keeps="state-000000004.pt",
        says="going on after update 4 of 4",
    ),
}
# further loops of these stages
OTHER_LOOPS = {
    "dataset": Step("pipestill.data.duplicates._Components.join", 3, keeps="*"),
    "reference": Step("pipestill.evaluation.tables._write_rows", 3, more=1, keeps="train.done-0"),
}
# and where no loop asks, so that the signal interrupts
BETWEEN = {
    "dataset": Step("os.scandir", 2),
    "reference": Step("pipestill.evaluation.measure.drawn_rows", 1, keeps="classifier.*"),
    "train@teacher": Step("pipestill.networks.model.save_model", 1),
    "distill@student-4": Step("pipestill.networks.model.load_model", 1),
    "sample@student-4": Step("pipestill.artifacts.describe_files", 1),
    "evaluate@student-4": Step("pipestill.evaluation.measure.measure", 1),
    "report": Step("pipestill.reporting.page.render", 1),
}
# commands beside the stages: their words, and what the next start says
COMMANDS = {
    "export": (
        Step("pipestill.networks.model.read_card", 1, says="MIT"),
        ("--model", "artifacts/models/student-4", "--output", "handed-over", "--licence", "MIT"),
    ),
    "bench": (
        Step("pipestill.commands.bench.start", 1),
        ("--name", "teacher", "--dataset", "artifacts/dataset", "--output", "measured", "--ranks", "1"),
    ),
    "record": (Step("pipestill.standing.Standing.problem", 3, says="finished stages are recorded"), ()),
    "sync": (Step("pipestill.standing.Standing.problem", 3, says="are up to date for Snakemake"), ()),
    "config": (Step("pipestill.configure.compose", 1, says="params.yaml"), TINY),
}


def stopped_at(step: Step, number: signal.Signals, folder: Path, *words: str) -> str:
    """What a `pipestill` command prints that sends itself a signal, and must end with 75 and no more steps."""
    program = str(Path(__file__).with_name("signal_at.py"))
    arguments = [step.function, str(step.call), str(int(number)), *words]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIPESTILL_")}
    log = folder / "stopped.log"
    with log.open("wb") as output:
        process = forked.start(program, arguments, variables, output=output, folder=folder) or subprocess.Popen(
            [sys.executable, "-P", program, *arguments], cwd=folder, env=variables, stdout=output, stderr=output
        )
        try:
            code = process.wait(SECONDS)
            ended = time.monotonic()
        finally:
            process.kill()
    said = log.read_text()
    log.unlink()
    assert code == 75, said
    assert ended - float(said.partition(SENT)[2].split()[0]) < WITHIN, said
    assert "Traceback" not in said
    assert number.name in said.splitlines()[-1]
    assert said.count(AGAIN) <= step.more, said
    return said


@pytest.fixture(scope="module")
def project(tiny: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished pipeline, of which each test removes and makes one artefact."""
    return tiny.copy(tmp_path_factory.mktemp("stops") / "project")


def stops_and_goes_on(project: Project, address: str, step: Step, number: signal.Signals, *, again: bool) -> None:
    stage = dvc_stages(project.root)[address]
    words = shlex.split(str(stage["command"]))[1:]
    artefact = project.root / words[words.index("--output") + 1]
    runs = project.root / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    whole, kept = payload(artefact), artefact.with_name("kept")
    artefact.rename(kept)
    try:
        stopped_at(step, number, project.root, *words)
        assert not artefact.exists()
        if step.keeps is not None:
            assert list(runs.glob(f"{words[0]}/*/state/{step.keeps}"))
        if again:
            assert step.says in project.here(*words)
            assert payload(artefact) == whole
    finally:
        shutil.rmtree(artefact, ignore_errors=True)
        kept.rename(artefact)  # for the tests that come


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("address", STEPS)
def test_a_stage_stops_at_its_step_and_goes_on(project: Project, address: str, number: signal.Signals) -> None:
    stops_and_goes_on(project, address, STEPS[address], number, again=number == signal.SIGTERM)


@pytest.mark.parametrize("address", OTHER_LOOPS)
def test_a_stage_stops_at_a_step_of_another_loop_and_goes_on(project: Project, address: str) -> None:
    stops_and_goes_on(project, address, OTHER_LOOPS[address], signal.SIGINT, again=True)


@pytest.mark.parametrize("address", LAST)
def test_a_stage_stops_after_its_last_step_with_its_state_saved(project: Project, address: str) -> None:
    stops_and_goes_on(project, address, LAST[address], signal.SIGTERM, again=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("address", BETWEEN)
def test_a_stage_is_interrupted_where_no_loop_asks_and_goes_on(
    project: Project, address: str, number: signal.Signals
) -> None:
    stops_and_goes_on(project, address, BETWEEN[address], number, again=number == signal.SIGTERM)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_beside_the_stages_is_interrupted_and_can_be_given_again(project: Project, command: str) -> None:
    step, words = COMMANDS[command]
    before = {path.name for path in project.root.iterdir()}
    stopped_at(step, signal.SIGTERM, project.root, command, *words)
    assert {path.name for path in project.root.iterdir()} - {"runs"} == before - {"runs"}
    if step.says:
        assert step.says in project.here(command, *words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_conversion_is_interrupted_and_can_be_given_again(
    tmp_path: Path, digits: Path, number: signal.Signals
) -> None:
    layout = ADM | {"in_channels": 1, "out_channels": 1, "label_dim": 10}  # fits the embedded digits
    write_edm_pickle(tmp_path / "edm.pkl", layout, random_tensors(layout))
    files = [{"path": "edm.pkl", "source": "path", "location": "edm.pkl"}]
    converted = {"edm": {"input": "edm", "file": "edm.pkl"}}
    write_params(tmp_path / "params.yaml", fetched={"edm": {"files": files}}, converted=converted)
    project = Project(tmp_path)
    project.here("fetch", "--name", "edm", "--output", "fetched")
    words = ("convert", "--name", "edm", "--input", "fetched", "--dataset", str(digits), "--output", "edm")
    stopped_at(Step("pipestill.networks.model.save_model", 1), number, tmp_path, *words)
    assert not (tmp_path / "edm").exists()
    project.here(*words)
    assert (tmp_path / "edm" / "manifest.json").exists()


def test_a_signal_after_the_last_question_is_raised_where_the_outermost_loop_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(DEADLINE, raising=False)
    stop, reached = StopRequest(), []
    with (
        handlers_kept(),
        pytest.raises(Stopped, match="stopped by SIGTERM: start it again"),
        stop.listening(),
        stop.at_steps(),
    ):
        with stop.at_steps():
            os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the outer loop")
    assert reached == ["the outer loop"]
    with handlers_kept(), pytest.raises(ValueError, match="its own"), stop.listening(), stop.at_steps():
        raise ValueError("its own")  # an error is not replaced


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_hangs_in_a_read_holds_up_nothing(project: Project, number: signal.Signals) -> None:
    """The fortieth image that a worker decodes sends the signal to the main process and never comes back."""
    words = ("dataset", "--output", "elsewhere", "operation.workers=2")
    said = stopped_at(Step("pipestill.data.ingest.prepare", 40), number, project.root, *words)
    assert "start it again" in said
    project.here(*words)
    assert payload(project.root / "elsewhere") == payload(project.root / "artifacts" / "dataset")
    shutil.rmtree(project.root / "elsewhere")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_stops_sending_holds_up_nothing(tmp_path: Path, number: signal.Signals) -> None:
    content, asked, sent = bytes(range(256)) * 8192, [], []

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
            sent.append(time.monotonic())
            command.process.send_signal(number)
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
        assert time.monotonic() - sent[0] < WITHIN
        released.set()
        code, output = run(*words, runs=tmp_path / "runs")
    finally:
        released.set()
        server.shutdown()
        server.server_close()
    assert code == 0, output
    assert (tmp_path / "fetched" / "a.bin").read_bytes() == content
    assert asked[1] >= 1 << 20  # it went on where it had stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_digest_of_a_large_file_holds_up_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Tens of gigabytes of zeros, which take no room and minutes to digest."""
    place = tmp_path / "inputs" / "a.bin"
    place.parent.mkdir()
    with place.open("wb") as file:
        file.truncate(64 << 30)
    stated = {"path": "a.bin", "source": "https", "location": "http://127.0.0.1:1/a.bin", "sha256": 64 * "0"}
    params = write_params(tmp_path / "params.yaml", fetched={"a": {"files": [stated]}})
    words = ("fetch", "--name", "a", "--output", tmp_path / "fetched", "--from", place.parent, "--params", params)
    command = Command(*words, runs=tmp_path / "runs")
    assert command.wait_until(lambda: bytes_read(command.process.pid) > 128 << 20), command.output
    sent = time.monotonic()
    command.process.send_signal(number)
    assert command.wait() == 75, command.output
    assert time.monotonic() - sent < WITHIN
    assert command.output.splitlines() == [
        f"a.bin: taken from {place}",
        f"a.bin: checking {64 << 30:,} bytes",
        f"pipestill fetch: stopped by {number.name}: start it again",
    ]
    assert not (tmp_path / "fetched").exists()
    place.unlink()  # whoever copies it would have to write it all


def bytes_read(pid: int) -> int:
    """What a process has read from files so far."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


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
