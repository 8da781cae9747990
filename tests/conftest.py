"""Fixtures that several test files share, and the rule that CI skips nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import forked

if TYPE_CHECKING:
    from workflow_project import Project

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the commands do it; before torch is imported

# begun first, in this order, so that no process is left with one at the end
LONGEST = (
    *("test_slurm.py", "test_workflow_runs.py", "test_sampling_command.py", "test_train.py", "test_experiments.py"),
    *("test_launch.py", "test_workflow.py", "test_convert.py", "test_benchmarks.py", "test_watch.py"),
    *("test_distill.py", "test_two_pipelines.py", "test_interleaving.py"),
)
NOT_INSTALLABLE = ("no GPU here", "no mount namespace here")  # reasons that stand in CI too


def pytest_configure(config: pytest.Config) -> None:
    """Makes room for the fork servers that all workers share; the first command starts them, they end with this run."""
    if not hasattr(config, "workerinput") and forked.SERVERS not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="pipestill-forks-"))
        forked.open_servers(folder)
        config.add_cleanup(lambda: _remove(folder))


def _remove(folder: Path) -> None:
    os.environ.pop(forked.SERVERS)
    shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_what_ci_skips(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_what_ci_skips(report)
    return report


def _fail_what_ci_skips(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Where PIPESTILL_CI=1, nothing may be missing that can be installed; what is expected to fail is not skipped."""
    if os.environ.get("PIPESTILL_CI") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(missing in reason for missing in NOT_INSTALLABLE):
        report.outcome = "failed"
        report.longrepr = f"nothing may be skipped with PIPESTILL_CI=1: {reason}"


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the right form for the `inception` extractor, with random weights from a fixed seed."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *arguments: object, **named: object) -> None:
            """Keeps the random start."""

    path = tmp_path_factory.mktemp("weights") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save({}, path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A small pipeline, finished and recorded (workflow_project.make_tiny), one for all workers; tests use copies."""
    from workflow_project import Project, make_tiny

    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # the workers' folders lie side by side in it
    root, finished = place / "tiny", place / "tiny.finished"
    with (place / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            make_tiny(root)
            finished.touch()
    return Project(root)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset artefact of the embedded digits, made by the stages themselves; read only."""
    from pipestill.config import DataParams, ExampleParams
    from pipestill.stages.dataset import build
    from pipestill.stages.example import write_example

    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_RUNS", str(folder / "runs"))
        write_example(ExampleParams(kind="digits"), folder / "digits")
        params = DataParams(path=str(folder / "digits" / "images"), resolution=8, color="grey", transform="none")
        build(params, folder / "dataset")
    return folder / "dataset"


@pytest.fixture(scope="session")
def digits_reference(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A reference artefact of the digits with a hardly trained classifier; read only."""
    from pipestill.config import ClassifierParams, FloorParams, OperationParams, ProtocolParams, ReferenceParams
    from pipestill.stages.reference import build_reference

    folder = tmp_path_factory.mktemp("reference")
    params = ReferenceParams(
        protocol=ProtocolParams(kid_subsets=3, kid_subset_size=20),
        classifier=ClassifierParams(channels=(8,), features=8, iterations=30),
        floor=FloorParams(counts=(20,), draws=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_RUNS", str(folder / "runs"))
        build_reference(params, dataset=digits, output=folder / "reference", operation=OperationParams())
    return folder / "reference"
