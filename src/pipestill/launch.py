"""Starting ranks: one process, or torchrun's elastic agent on this node. Only this module knows how ranks are started.

The same command line runs again in every rank; the ranks leave their outcomes behind, and the launcher turns them
into one exit code and one message (torchrun itself turns every code into 1).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pipestill.errors import InputError, Stopped, SurroundingsError

OUTCOME = "PIPESTILL_OUTCOME"  # variable naming the folder in which ranks leave their outcomes and process ids
CONSEQUENCES = (signal.SIGTERM, signal.SIGABRT)  # signals by which a rank ends that has lost another
GRACE = 5.0  # seconds between a rank's failure and the end of those that did not notice
SHUTDOWN = 600  # seconds that ranks have to save their state and stop when they are asked to


def is_rank() -> bool:
    """Whether this process is a rank already."""
    return "TORCHELASTIC_RUN_ID" in os.environ


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
    (folder / f"pid-{own}").write_text(str(os.getpid()))
    others = [rank for rank in range(int(os.environ["LOCAL_WORLD_SIZE"])) if str(rank) != own]

    def watch() -> None:
        while not any(_failed(folder, rank) for rank in others):
            time.sleep(0.2)
        time.sleep(GRACE)
        os._exit(SurroundingsError.exit_code)

    threading.Thread(target=watch, name="siblings", daemon=True).start()


def _failed(folder: Path, local_rank: int) -> bool:
    """Whether a rank of this node has gone without having done its work or stopped as asked."""
    try:
        pid = int((folder / f"pid-{local_rank}").read_text())
    except (FileNotFoundError, ValueError):
        return False  # still starting
    try:
        os.kill(pid, 0)
        return False
    except ProcessLookupError:
        pass
    global_rank = int(os.environ["RANK"]) - int(os.environ["LOCAL_RANK"]) + local_rank
    try:
        return int((folder / str(global_rank)).read_text().split("\n", 2)[1]) not in (0, Stopped.exit_code)
    except FileNotFoundError:
        return True


def run_ranks(ranks: int, argv: Sequence[str]) -> tuple[int, str]:
    """Runs `pipestill <argv>` as `ranks` processes on this node; returns the exit code and its message.

    A rank that fails ends the others within seconds; SIGTERM, SIGINT and SIGUSR2 reach every rank.
    """
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # the agent's own lines name no cause that ranks do not name better
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="pipestill-ranks-") as outcomes:
        os.environ |= {OUTCOME: outcomes, "OMP_NUM_THREADS": "1"}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=f"pipestill-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            signals_to_handle="SIGTERM,SIGINT,SIGUSR2",
        )
        if hasattr(config, "shutdown_timeout"):
            config.shutdown_timeout = SHUTDOWN
        try:
            elastic_launch(config, sys.executable)("-m", "pipestill", *argv)
            return 0, ""
        except ChildFailedError as error:
            killed = {rank: failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
        except SignalException:
            killed = {}
        return _outcome(Path(outcomes), killed)


def _outcome(folder: Path, killed: dict[int, int]) -> tuple[int, str]:
    """What went wrong first: wrong input, which no lost rank brings about; a killed rank; the first outcome left.

    A rank that was killed left no outcome and is named by its signal.
    """
    left = []
    for file in folder.iterdir():
        if file.name.isdigit():
            moment, exit_code, message = file.read_text().split("\n", 2)
            left.append((float(moment), int(file.name), int(exit_code), message))
    for _, _, code, message in sorted(left):
        if code == InputError.exit_code:
            return code, message
    silent = [(rank, -number) for rank, number in killed.items() if not (folder / str(rank)).exists()]
    causes = [found for found in silent if found[1] not in CONSEQUENCES]
    failures = [(code, message) for _, _, code, message in sorted(left) if code]
    if failures and not causes:
        return failures[0]
    if silent:
        first, number = min(causes or silent)
        return 3, f"rank {first} was ended by {signal.Signals(number).name}; its state is kept, start it again"
    return 3, "a rank ended without a word: see its output above"


def leave_outcome(code: int, message: str) -> None:
    """Leaves this rank's exit code and message where the launcher looks."""
    folder = os.environ.get(OUTCOME)
    if folder and is_rank():
        rank = os.environ["RANK"]
        partial = Path(folder, f".{rank}")
        partial.write_text(f"{time.time()}\n{code}\n{message}")
        partial.rename(Path(folder, rank))
