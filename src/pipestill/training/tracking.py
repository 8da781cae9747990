"""Trackers: one small interface for whoever wants a training's figures; the log in the run's folder is always kept.

TensorBoard, MLflow and Weights & Biases are optional and imported when asked for. A tracker that fails while a
training goes on is switched off with one warning; the training goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipestill import work
from pipestill.errors import InputError
from pipestill.progress import warn

PROJECT = "pipestill"  # experiment of MLflow, project of Weights & Biases
LONGEST_VALUE = 500  # characters of a parameter that MLflow is given


class Tracker(Protocol):
    """Takes figures and pictures as a training goes on."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """`image` is uint8 [H, W, 1 or 3]."""
        ...

    def close(self) -> None: ...


class Silent:
    """Tracks nothing: for ranks other than the leader."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        pass

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        pass

    def close(self) -> None:
        pass


class JsonLines:
    """`log.jsonl`: one line an entry, with the time. A resumed training repeats the updates since its last state."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3)} | dict(figures)) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files below `<folder>/tensorboard`; `tensorboard --logdir runs` finds those of every run."""

    def __init__(self, folder: Path, run_name: str, parameters: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        table = "\n".join(f"| {name} | {value} |" for name, value in flat(parameters).items())
        self._call("add_text", "parameters", f"**{run_name}**\n\n| parameter | value |\n| --- | --- |\n{table}")

    def _call(self, method: str, *values: Any, **named: Any) -> None:
        getattr(self._writer, method)(*values, **named)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._call("add_scalar", name, value, step)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._call("add_image", name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._call("close")


class MLflow:
    """A run in `$MLFLOW_TRACKING_URI`, by default the file store `<runs>/mlflow` that all trainings share.

    A resumed training goes on in the run that it began.
    """

    def __init__(self, folder: Path, run_name: str, parameters: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs packages that the client lacks
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        store = (work.runs_root() / "mlflow").absolute()
        store.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", store.as_uri()))
        kept = folder / "mlflow-run.txt"
        if kept.exists():
            self._run = kept.read_text(encoding="utf-8")
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        self._run = self._client.create_run(experiment, run_name=run_name).info.run_id
        params = [Param(name, value[:LONGEST_VALUE]) for name, value in flat(parameters).items()]
        self._client.log_batch(self._run, params=params)
        work.write_atomic(kept, self._run)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[self._metric(name, figures[name], now, step) for name in figures])

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._client.log_image(self._run, image, key=name, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WeightsAndBiases:
    """A run below `<folder>/wandb`: offline unless `WANDB_API_KEY` or `WANDB_MODE` says otherwise."""

    def __init__(self, folder: Path, run_name: str, parameters: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._picture = wandb.Image
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = wandb.init(
            project=PROJECT,
            name=run_name,
            id=f"{folder.parent.name}-{folder.name}",
            dir=str(folder),
            mode=mode,
            resume="allow",
            config=dict(parameters),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        self._run.define_metric("update")  # its own steps must grow, and a resumed training repeats some
        self._run.define_metric("*", step_metric="update")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"update": step} | dict(figures))

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._run.log({"update": step, name: self._picture(image)})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


class Guarded:
    """A tracker that ends with its first failure, in one line, instead of ending the training."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._tracker = Silent()
            warn(f"tracker {self._name} is off from here on ({_one_line(error)}); the training goes on")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, figures))

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._try(lambda: self._tracker.image(step, name, image))

    def close(self) -> None:
        self._try(self._tracker.close)


class Several:
    """Trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, figures)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        for tracker in self._trackers:
            tracker.image(step, name, image)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def open_trackers(names: Sequence[str], folder: Path, run_name: str, parameters: Mapping[str, Any]) -> Tracker:
    """The log and the named trackers as one.

    Raises InputError where a tracker's package is missing, or where it cannot start.
    """
    opened: list[Tracker] = [JsonLines(folder)]
    try:
        opened += [_open(name, folder, run_name, parameters) for name in dict.fromkeys(names)]
    except InputError:
        Several(opened).close()
        raise
    return Several(opened)


def _open(name: str, folder: Path, run_name: str, parameters: Mapping[str, Any]) -> Tracker:
    try:
        return Guarded(name, TRACKERS[name](folder, run_name, parameters))
    except ImportError as error:
        raise InputError(
            f"operation.trackers: {name} is not installed ({_one_line(error)}): pip install 'pipestill[tracking]', "
            "or leave it out"
        ) from error
    except Exception as error:
        raise InputError(
            f"operation.trackers: {name} could not start ({_one_line(error)}): mend that, or leave it out"
        ) from error


def flat(parameters: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested parameters by full name, as text."""
    found: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{name}.")
        else:
            found[above + name] = str(value)
    return found


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
