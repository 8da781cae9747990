"""Asking a fork server for a process, which then looks and ends as if this process had started it.

Importing it costs next to nothing: the stand-ins for `pipestill` and the tools in projects' shells do so each time.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

SERVERS = "FORK_SERVERS"  # variable: the folder of this run's servers; `off` gives every command its own interpreter
# servers of a kind, which differ in the seed of Python's hashes: no two commands in a row agree by chance in it
SEEDS = 2
KINDS = {"pipestill": "stages", "snakemake": "tools", "dvc": "tools"}  # of servers, by the module that they run
STARTING = 120.0  # seconds
STAND_IN = """\
#!{python} -IS
import sys
sys.path.insert(0, {tests!r})
import forked
forked.stand_in_main({python!r})
"""
_turns = itertools.count(os.getpid())


def open_servers(folder: Path) -> None:
    """Lets commands use servers whose place is `folder`, which end with this process and have its variables."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PIPESTILL_")}
    (folder / "owner.json").write_text(json.dumps([os.getpid(), variables]))
    os.environ[SERVERS] = str(folder)


class Process:
    """A forked process, with what the tests use of subprocess.Popen."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid, self.returncode, self._connection = pid, None, connection
        self.returncode: int | None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(["pipestill"], timeout or 0.0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def _end(self) -> None:
        answer = _line(self._connection)
        self.returncode = int(answer["code"]) if answer else -signal.SIGKILL  # the server is gone
        self._connection.sendall(b"c")
        self._connection.recv(1)  # closed when nothing is left of the process
        self._connection.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    output: IO[Any],
    folder: Path | None = None,
    kind: str = "stages",
) -> Process | None:
    """Runs a module of KINDS, or a file on a server of that kind, in a new session with a file as its output.

    None where that needs an own interpreter.
    """
    place = _server(KINDS.get(module, kind))
    if place is None:
        return None
    with open(os.devnull) as nothing:
        files = (nothing.fileno(), output.fileno(), output.fileno())
        return ask(place, module, arguments, environment, folder=folder, files=files)


@contextmanager
def children_forked() -> Iterator[None]:
    """Within, ranks and tools that a command in this process starts ask a server, as those of a forked process do."""
    folder, own = stand_in(), sys.executable
    sys.executable = str(folder / "python") if folder else own
    try:
        yield
    finally:
        sys.executable = own


def stand_in() -> Path | None:
    """A folder for the search path whose programs ask a server; None where there is none to ask."""
    servers = _servers()
    if servers is None:
        return None
    folder = servers / "bin"
    with _locked(servers / "bin.lock"):
        if not folder.exists():
            folder.mkdir()
            for name in (*KINDS, "python"):
                program = folder / name
                program.write_text(STAND_IN.format(python=sys.executable, tests=str(Path(__file__).parent)))
                program.chmod(0o755)
    return folder


def stand_in_main(python: str) -> NoReturn:
    """What those programs do: pass signals on, end as the forked process does, and take it along if killed.

    As `python`, this holds for `-m` and a module that servers run.
    """
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda number, frame: came.append(number))
    name, words = Path(sys.argv[0]).name, sys.argv[1:]
    if name == "python" and words[:1] == ["-m"] and words[1] in KINDS:
        name, words = words[1], words[2:]
        if name == "pipestill":
            _end_with_parent()  # as ranks do
    place = _server(KINDS[name], python) if name in KINDS else None
    process = place and ask(place, name, words, os.environ, tied=True)
    if process is None:
        program = str(Path(python).with_name(Path(sys.argv[0]).name))
        os.execv(program, [program, *sys.argv[1:]])
    for number in came:
        process.send_signal(number)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait()
    if code < 0:
        with suppress(OSError):  # SIGKILL has no other handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def ask(
    server: Path,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    folder: Path | None = None,
    files: tuple[int, int, int] = (0, 1, 2),
    tied: bool = False,
) -> Process | None:
    """A process of a running server; `tied` ends it when this process ends. None where the server refuses."""
    umask = os.umask(0o077)
    os.umask(umask)
    wanted = {
        "module": module,
        "arguments": list(arguments),
        "environment": dict(environment),
        "folder": str(folder or Path.cwd()),
        "umask": umask,
        "tied": tied,
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(server / "socket"))
    body = json.dumps(wanted).encode()
    message = struct.pack("!I", len(body)) + body
    sent = socket.send_fds(connection, [message], files)
    if sent < len(message):  # a server that has all of it may have answered and closed
        connection.sendall(message[sent:])
    answer = _line(connection)
    if answer is None:
        raise ConnectionError(f"the fork server ended: see {server}.log")
    if "refused" in answer:
        connection.close()
        return None
    return Process(connection, answer["pid"])


def _line(connection: socket.socket) -> dict[str, Any] | None:
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(4096)
        if not more:
            return None
        data += more
    answer: dict[str, Any] = json.loads(data)
    return answer


def _servers() -> Path | None:
    named = os.environ.get(SERVERS, "off")
    return None if named == "off" else Path(named)


def _server(kind: str, python: str = sys.executable) -> Path | None:
    """The folder of a server that runs, each in turn; the first to want it starts it. None where none are wanted."""
    servers = _servers()
    if servers is None:
        return None
    place = servers / f"{kind}-{next(_turns) % SEEDS}"
    if (place / "ready").exists():
        return place
    with _locked(place.with_suffix(".lock")):
        if not place.exists():
            place.mkdir()
            stand_in()
            owner, variables = json.loads((servers / "owner.json").read_text())
            with Path(f"{place}.log").open("wb") as log:
                subprocess.Popen(
                    [python, "-P", str(Path(__file__).with_name("fork_server.py")), kind, str(place), str(owner)],
                    env=variables | {"OMP_NUM_THREADS": "1", SERVERS: str(servers)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
    limit = time.monotonic() + STARTING
    while not (place / "ready").exists():
        assert time.monotonic() < limit, f"no fork server: {Path(f'{place}.log').read_text()}"
        time.sleep(0.02)
    return place


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def variables_of(pid: int) -> dict[str, str]:
    """The variables that a process was started with, forked or not. Raises OSError where there is no such process."""
    note = _note(pid)
    if note is not None:
        return dict(note["environment"])
    text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


def stands_in(pid: int) -> bool:
    """Whether a process is a stand-in, whose work another one does."""
    servers = _servers()
    return servers is not None and f"\0{servers}/bin/" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")


def starter_of(pid: int) -> int:
    """The process that started another, forked or not. Raises OSError where there is no such process."""
    note = _note(pid)
    if note is not None:
        return int(note["asker"])
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _note(pid: int) -> dict[str, Any] | None:
    servers = _servers()
    for file in servers.glob(f"*/{pid}.json") if servers else ():
        try:
            note: dict[str, Any] = json.loads(file.read_text())
        except FileNotFoundError:
            continue  # it has just ended
        return note
    return None
