"""What a running stage reports: one small file in its work folder, written anew every few seconds.

`pipestill status` reads it, on whatever machine the stage runs; it decides nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipestill import progress
from pipestill.errors import Stopped
from pipestill.stopping import Interrupted

FILE = "status.json"
EVERY = 5.0  # seconds between two writings
SILENT = 60.0  # seconds after which a running stage that has not written is taken for lost
JOB = "PIPESTILL_JOB"  # variable: the scheduler's number of this job
ATTEMPT = "PIPESTILL_ATTEMPT"  # variable: which attempt of the scheduler's this is
LOG = "PIPESTILL_LOG"  # variable: where this attempt's logs lie, without what differs between ranks


@contextmanager
def told(path: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Keeps the file at `path` up to date while the work within goes on, and says at the end how that was.

    A file that cannot be written is no failure of the work.
    """
    body = {
        "state": "running",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get(JOB),
        "attempt": int(os.environ.get(ATTEMPT, "0")) or None,
        "log": f"{os.environ[LOG]}.log" if LOG in os.environ else None,
        "began": time.time(),
        **facts,
    }
    partial = path.with_name(f".{path.name}.partial")
    ended = threading.Event()

    def say(**more: Any) -> None:
        text = json.dumps(body | {"time": time.time(), "doing": progress.current()} | more, indent=1) + "\n"
        with suppress(OSError):
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)  # not fsynced: after a power cut it says nothing that is still true

    def beat() -> None:
        while not ended.wait(EVERY):
            say()

    say()
    thread = threading.Thread(target=beat, name="status", daemon=True)
    thread.start()
    last: dict[str, Any] = {"state": "done"}
    try:
        yield
    except (Stopped, Interrupted) as error:
        last = {"state": "stopped", "error": str(error)}
        raise
    except BaseException as error:
        last = {"state": "failed", "error": str(error) or type(error).__name__}
        raise
    finally:
        ended.set()
        thread.join()
        say(**last)


def read(path: Path) -> dict[str, Any] | None:
    """What a stage said last, with the state `lost` where it can say no more; None where there is no such file."""
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if body["state"] == "running" and (time.time() - body["time"] > SILENT or _has_ended(body)):
        body["state"] = "lost"
    return body


def _has_ended(body: Mapping[str, Any]) -> bool:
    """Whether the process is known not to run any more: that can be told on its own machine alone."""
    here = body["host"] == socket.gethostname() and Path("/proc/self").exists()
    return here and not Path("/proc", str(body["pid"])).exists()
