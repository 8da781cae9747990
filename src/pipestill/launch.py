"""Starting ranks: one process, torchrun's agent on this node, or one agent on each node of a Slurm job through srun.

Only this module knows how ranks are started. The same command line runs again in every rank; the ranks leave their
outcomes behind, and the launcher turns them into one exit code and one message (torchrun itself turns every code into
1). Over nodes the outcomes lie in a folder that all of them see.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipestill import logs, slurm, status
from pipestill.errors import InputError, Stopped, SurroundingsError
from pipestill.progress import warn
from pipestill.stopping import STOP_SIGNALS, handlers_kept
from pipestill.work import runs_root, scratch, write_atomic

OUTCOME = "PIPESTILL_OUTCOME"  # variable naming the folder in which ranks leave their outcomes and process ids
HEAD = "PIPESTILL_HEAD"  # variable naming the node where the ranks of several nodes meet
CONTAINER = "PIPESTILL_CONTAINER"  # variable naming the image that this process runs in
NODES = "PIPESTILL_NODES"  # variable naming the folder in which the nodes of one launch leave their outcomes
LOST_ANOTHER = "lost another rank"  # how a rank begins that only suffers from what happened elsewhere
LOST = "lost"  # file in that folder: a node has failed
CONSEQUENCES = (signal.SIGTERM, signal.SIGABRT)  # signals by which a rank ends that has lost another
GRACE = 5.0  # seconds between a rank's failure and the end of those that did not notice
LOOPBACK = "127.0.0.1"
LINUX = sys.platform == "linux"
JOINING = 300  # seconds in which all nodes have to have come
SHUTDOWN = 600  # seconds that ranks have to save their state and stop when they are asked to


def is_rank() -> bool:
    """Whether this process is a rank already."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_collected() -> bool:
    """Whether a launcher of ours collects this rank's outcome and says what it was."""
    return is_rank() and OUTCOME in os.environ


def die_with_launcher() -> None:
    """Asks the kernel to end this rank when its launcher dies (kill -9 reaches the launcher alone)."""
    set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(set_parent_death_signal, signal.SIGKILL)


def watch_siblings() -> None:
    """Ends this rank a few seconds after another rank of this node failed, whatever it is waiting for by then.

    A rank that computes, saves or waits for a GPU does not notice a lost peer by itself. Whoever notices in time leaves
    an outcome of its own; the launcher names the first cause. Under any other launcher nothing is watched.
    """
    if OUTCOME not in os.environ:
        return
    folder, own = Path(os.environ[OUTCOME]), os.environ["LOCAL_RANK"]
    (folder / f"pid-{own}").write_text(str(os.getpid()), encoding="utf-8")
    others = [rank for rank in range(int(os.environ["LOCAL_WORLD_SIZE"])) if str(rank) != own]

    lost = Path(os.environ[NODES], LOST) if NODES in os.environ else None

    def watch() -> None:
        while not any(_failed(folder, rank) for rank in others) and not (lost and lost.exists()):
            time.sleep(0.2)
        time.sleep(GRACE)
        os._exit(SurroundingsError.exit_code)

    threading.Thread(target=watch, name="siblings", daemon=True).start()


def _failed(folder: Path, local_rank: int) -> bool:
    """Whether a rank of this node has gone without having done its work or stopped as asked."""
    try:
        pid = int((folder / f"pid-{local_rank}").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False  # still starting
    try:
        os.kill(pid, 0)
        return False
    except ProcessLookupError:
        pass
    global_rank = int(os.environ["RANK"]) - int(os.environ["LOCAL_RANK"]) + local_rank
    try:
        return int((folder / str(global_rank)).read_text(encoding="utf-8").split("\n", 2)[1]) not in (
            0,
            Stopped.exit_code,
        )
    except FileNotFoundError:
        return True


@dataclass(frozen=True)
class Spread:
    """How a stage is started: its ranks, the nodes that share them, and the Apptainer image that they run in."""

    ranks: int = 1
    nodes: int = 1
    image: str | None = None


def start(spread: Spread, argv: Sequence[str], *, entry: str | None = None) -> tuple[int, str]:
    """Runs `pipestill <argv>` as so many ranks, as many on each node; exit code and its message.

    A rank that fails ends the others within seconds; SIGTERM, SIGINT and SIGUSR2 reach every rank. Where the Slurm job
    has fewer nodes than wanted, those do the work with as many ranks each. Ranks other than the leader print to files
    of their own, below the logs of `entry`. Raises InputError where the ranks do not fit the nodes, or there is no
    Slurm job.
    """
    with _variables({status.LOG: str(logs.folder(runs_root().absolute(), argv[0], entry) / "by-hand")}):
        return _start(spread, argv)


def _start(spread: Spread, argv: Sequence[str]) -> tuple[int, str]:
    ranks, nodes = spread.ranks, spread.nodes
    if ranks % nodes:
        raise InputError(f"{ranks} ranks cannot be shared evenly by {nodes} nodes: set operation.ranks to a multiple")
    if nodes == 1:
        if spread.image is not None:
            within(spread.image, argv)
        # on loopback: a container's own name need not resolve
        here = {"rdzv_backend": "c10d", "rdzv_endpoint": f"{LOOPBACK}:0", "local_addr": LOOPBACK}
        with scratch("ranks") as outcomes, _variables({"GLOO_SOCKET_IFNAME": "lo"} if LINUX else {}):
            run_id = f"pipestill-{os.getpid()}"
            return _agent(outcomes, argv, nproc_per_node=ranks, min_nodes=1, max_nodes=1, run_id=run_id, **here)
    if NODES in os.environ:
        return _on_a_node(ranks, nodes, argv)
    job = slurm.current_job()
    if job is None or shutil.which("srun") is None:
        raise InputError(
            f"{nodes} nodes need a Slurm job: use snakemake --profile slurm, start this within "
            f"sbatch --nodes {nodes}, or set operation.nodes to 1"
        )
    if job.nodes < nodes:
        fewer = ranks // nodes * job.nodes
        warn(f"job {job.number} has {job.nodes} of {nodes} nodes: {fewer} of {ranks} ranks share the same batches")
        argv, ranks, nodes = _with_options(argv, ranks=fewer, nodes=job.nodes), fewer, job.nodes
        if nodes == 1:
            return _start(Spread(ranks, nodes, spread.image), argv)
    return _over_nodes(job, nodes, argv, spread.image)


def _with_options(argv: Sequence[str], **options: int) -> list[str]:
    """A command line with options that replace earlier ones: after `--` they would be none."""
    end = argv.index("--") if "--" in argv else len(argv)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*argv[:end], *words, *argv[end:]]


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that are not set, for the processes that are started within."""
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _agent(outcomes: Path, argv: Sequence[str], **settings: Any) -> tuple[int, str]:
    """Torchrun's agent for this node's ranks, which leave their outcomes in a folder."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if "LOGLEVEL" not in os.environ:
        _silence("torch.distributed.elastic")  # the agent's own lines name no cause that ranks do not name better
    settings["logs_specs"] = DefaultLogsSpecs(log_dir=str(outcomes / "agent"))
    asked: str | None = None
    config = LaunchConfig(max_restarts=0, monitor_interval=0.1, signals_to_handle="SIGTERM,SIGINT,SIGUSR2", **settings)
    if hasattr(config, "shutdown_timeout"):
        config.shutdown_timeout = SHUTDOWN
    try:
        os.environ |= {OUTCOME: str(outcomes), "OMP_NUM_THREADS": "1"}
        elastic_launch(config, sys.executable)("-m", "pipestill", *argv)
        return 0, ""
    except ChildFailedError as error:
        killed = {rank: failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
    except SignalException as error:
        killed, asked = {}, error.sigval.name
    finally:
        os.environ.pop(OUTCOME)  # it names the ranks of this launch alone
        # srun's, to a node that has ended: the agent's own handler would raise it here
        signal.signal(signal.SIGTERM, lambda number, frame: None)
    if asked is not None and not any(outcomes.glob("[0-9]*")):
        return Stopped.exit_code, f"stopped by {asked}: start it again"  # before a rank could say so
    return _outcome(outcomes, killed)


def _silence(package: str) -> None:
    """Hides the log lines of all modules of a package, whatever level they set for themselves."""
    for name in (package, *logging.root.manager.loggerDict):
        if name == package or name.startswith(f"{package}."):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def within(image: str, argv: Sequence[str]) -> NoReturn:
    """Becomes `pipestill <argv>` in an Apptainer image. Raises InputError where there is no Apptainer."""
    if shutil.which("apptainer") is None:
        raise InputError(f"operation.container={image} needs apptainer, which is not installed here")
    os.environ[CONTAINER] = image
    command = _command(image, argv)
    os.execvp(command[0], command)


def _command(image: str | None, argv: Sequence[str]) -> list[str]:
    """`pipestill <argv>` as it is started here, or in an image that sees the GPUs, this folder and the variables."""
    if image is None:
        return [sys.executable, "-m", "pipestill", *argv]
    return ["apptainer", "exec", "--nv", image, "pipestill", *argv]


def _over_nodes(job: slurm.Job, nodes: int, argv: Sequence[str], image: str | None) -> tuple[int, str]:
    """Starts this command once on each node of the Slurm job; each starts its ranks, and all outcomes become one."""
    with scratch(f"nodes-{job.number}") as folder:
        return _through_srun(job, nodes, _command(image, argv), folder, image)


def _through_srun(job: slurm.Job, nodes: int, words: list[str], folder: Path, image: str | None) -> tuple[int, str]:
    tasks = [f"--{name}={nodes}" for name in ("nodes", "ntasks")]
    command = ["srun", *tasks, "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1", "--export=ALL"]
    variables = {NODES: str(folder), HEAD: job.first_node()} | ({} if image is None else {CONTAINER: image})
    # in a session of its own: at a SIGTERM or Ctrl-C srun would kill the ranks; what it passes on lets them save
    step = subprocess.Popen([*command, *words], env=os.environ | variables, start_new_session=True)
    with handlers_kept():
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: step.send_signal(signal.SIGUSR2))
        code = step.wait()
    found = _of_nodes(folder, nodes)
    if found is None:
        what = f"a node exited without reporting an error (srun exited with {code})"
        return 3, f"{what}; its state is kept, start it again"
    return found


def _of_nodes(folder: Path, nodes: int) -> tuple[int, str] | None:
    """What went wrong first on any node; None where a node said nothing and no other names a cause."""
    said = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("node-*/agent.json")]
    causes = sorted((each["time"], each["code"], each["message"]) for each in said if each["code"])
    for _, code, message in causes:
        if code == InputError.exit_code:
            return code, message
    failures = [(code, message) for _, code, message in causes if code != Stopped.exit_code]
    own = [cause for cause in failures if not cause[1].startswith(LOST_ANOTHER)]
    if own or (failures and len(said) == nodes):
        return (own or failures)[0]
    if len(said) < nodes:
        return None
    return causes[0][1:] if causes else (0, "")


def _on_a_node(ranks: int, nodes: int, argv: Sequence[str]) -> tuple[int, str]:
    """As srun's task on one node: its share of the ranks. The job's first node is where all of them meet."""
    if not {"SLURM_NODEID", "SLURM_JOB_ID", HEAD} <= os.environ.keys():
        raise SurroundingsError(f"{NODES} is set, but this is no task of srun: unset it")
    job, step, node = (int(os.environ.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "STEP_ID", "NODEID"))
    folder, shared = Path(os.environ[NODES], f"node-{node}"), Path(os.environ[NODES])
    folder.mkdir()
    code, message = _agent(
        folder,
        argv,
        nproc_per_node=ranks // nodes,
        min_nodes=nodes,
        max_nodes=nodes,
        rdzv_backend="static",
        rdzv_endpoint=f"{os.environ[HEAD]}:{20000 + (97 * job + step) % 20000}",
        rdzv_configs={"rank": node, "timeout": JOINING},
        run_id=f"pipestill-{job}-{step}",
    )
    write_atomic(folder / "agent.json", json.dumps({"time": time.time(), "code": code, "message": message}))
    if code in (0, InputError.exit_code, Stopped.exit_code):
        return 0, ""  # srun would end the other nodes' tasks, which may be saving
    (shared / LOST).touch()
    time.sleep(GRACE)  # the others' ranks see it, end and say why, before srun ends them
    return code, ""


def _outcome(folder: Path, killed: dict[int, int]) -> tuple[int, str]:
    """What went wrong first: wrong input, which no lost rank brings about; a killed rank; the first outcome left.

    A rank that was killed left no outcome and is named by its signal.
    """
    left = []
    for file in folder.iterdir():
        if file.name.isdigit():
            moment, exit_code, message = file.read_text(encoding="utf-8").split("\n", 2)
            left.append((float(moment), int(file.name), int(exit_code), message))
    for _, _, code, message in sorted(left):
        if code == InputError.exit_code:
            return code, message
    silent = [(rank, -number) for rank, number in killed.items() if not (folder / str(rank)).exists()]
    causes = [found for found in silent if found[1] not in CONSEQUENCES]
    failures = [(code, message + _where(rank, code)) for _, rank, code, message in sorted(left) if code]
    stopped = [failure for failure in failures if failure[0] == Stopped.exit_code]
    if (
        stopped
        and not killed
        and all(code == stopped[0][0] or said.startswith(LOST_ANOTHER) for code, said in failures)
    ):
        return stopped[0]  # the others lost a rank that stopped
    if failures and not causes:
        return failures[0]
    if silent:
        first, number = min(causes or silent)
        return 3, f"rank {first} was ended by {signal.Signals(number).name}; its state is kept, start it again"
    return 3, "a rank exited without reporting an error: see its output above"


def _where(rank: int, code: int) -> str:
    """Where the output of a rank lies that ended as only a bug does; the leader's stands in the terminal."""
    bug = code not in (0, InputError.exit_code, SurroundingsError.exit_code, Stopped.exit_code)
    prefix = os.environ.get(status.LOG)
    return f" (its output: {logs.of_rank(prefix, rank)})" if bug and rank and prefix else ""


def leave_outcome(code: int, message: str) -> None:
    """Leaves this rank's exit code and message where the launcher looks."""
    if is_collected():
        folder, rank = os.environ[OUTCOME], os.environ["RANK"]
        partial = Path(folder, f".{rank}")
        partial.write_text(f"{time.time()}\n{code}\n{message}", encoding="utf-8")
        partial.rename(Path(folder, rank))
