"""A real Slurm of two nodes on this machine, in a folder of its own: Debian's slurm-wlm and munge, started as root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import forked

NODES = ("n1", "n2")
SPARE = "n3"  # a node that is known, but not started with the others
CONF = Path("/etc/slurm/slurm.conf")  # jobs of Snakemake's plugin find Slurm here alone: they drop SLURM_CONF
CPUS = 2  # of each node, pretended or not
CONFIGURATION = """\
ClusterName=pipestill
SlurmctldHost=localhost
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
StateSaveLocation={folder}/control
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/control.pid
SlurmctldLogFile={folder}/control.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=15
KillWait=15
SchedulerParameters=bf_interval=1,sched_interval=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=n1,n2,n3 Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=16000"


def missing() -> str | None:
    """What this machine lacks for a cluster, in words; None where nothing is."""
    programs = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    if programs:
        return f"no {', '.join(programs)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    return f"this machine has a Slurm of its own ({CONF})" if CONF.exists() and not CONF.is_symlink() else None


class Cluster:
    """Its daemons run until `stop`; commands find it by SLURM_CONF."""

    def __init__(self, folder: Path, port: int = 17100) -> None:
        known = (*NODES, SPARE)
        for part in ("control", *known):
            (folder / part).mkdir(parents=True)
        nodes = [NODE.format(name=name, port=port + 1 + index, cpus=CPUS) for index, name in enumerate(known)]
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.conf.write_text(CONFIGURATION.format(folder=folder, control=port, nodes="\n".join(nodes)))
        CONF.unlink(missing_ok=True)  # what a killed run left
        CONF.parent.mkdir(exist_ok=True)
        CONF.symlink_to(self.conf)
        _authenticate()
        _name_hosts()
        self.start_control()
        for name in NODES:
            self.start_node(name)
        self.wait_for(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(NODES)))

    def start_control(self) -> None:
        self._call(["slurmctld", "-f", self.conf])

    def start_node(self, name: str) -> None:
        self._call(["slurmd", "-f", self.conf, "-N", name])

    def _call(self, command: Sequence[object]) -> None:
        subprocess.run([str(word) for word in command], check=True, timeout=60)

    def call(self, *command: object) -> str:
        """What a command says."""
        words = [str(word) for word in command]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout

    def kill(self, name: str) -> None:
        """SIGKILL to a daemon: a node's, or `control`."""
        os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)

    def running(self) -> list[tuple[str, str]]:
        """The number and the nodes of each running job."""
        listed = self.call("squeue", "--noheader", "--states=RUNNING", "--format=%i %N").splitlines()
        return [(line.split()[0], line.split()[1]) for line in listed]

    def processes(self, job: str, node: str) -> list[int]:
        """The process ids of a job's tasks on a node."""
        wanted = {f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}"}
        return [pid for pid, variables in _environments() if wanted <= variables]

    def rank(self, job: str, number: int) -> int:
        """The process id of a rank."""
        wanted = {f"SLURM_JOB_ID={job}", f"RANK={number}"}
        (found,) = [pid for pid, variables in _environments() if wanted <= variables and not forked.stands_in(pid)]
        return found

    def launcher(self, job: str) -> int:
        """The process id of the command that started the ranks of a batch job."""
        for pid, variables in _environments():
            command = Path("/proc", str(pid), "cmdline").read_text().split("\0")
            ours = any(Path(word).name == "pipestill" for word in command) and "python" in command[0]
            if ours and f"SLURM_JOB_ID={job}" in variables and not any("PIPESTILL_NODES=" in one for one in variables):
                return pid
        raise AssertionError(f"no launcher of job {job}")

    def wait_for(
        self, condition: Callable[[], object], seconds: float = 60.0, explain: Callable[[], str] = lambda: ""
    ) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, (
                f"nothing happened in {seconds} s:\n{self.call('squeue')}\n{self.call('sinfo', '-N')}\n{explain()}"
            )
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends the daemons by the process ids that they left."""
        with suppress(subprocess.CalledProcessError):
            self.call("scancel", "--full", "--state=RUNNING", "--user=root")
        for name in (*NODES, SPARE, "control"):
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        CONF.unlink(missing_ok=True)


def _environments() -> Iterator[tuple[int, set[str]]]:
    """The variables of every process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                variables = forked.variables_of(int(entry.name))
                yield int(entry.name), {f"{name}={value}" for name, value in variables.items()}


def _authenticate() -> None:
    """Starts munge, the authentication between Slurm's parts, where it does not run yet."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    socket = Path("/run/munge")
    socket.mkdir(exist_ok=True)
    shutil.chown(socket, "munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True, timeout=60)


def _name_hosts() -> None:
    """Makes the nodes' names known: a job's ranks meet on its first node by its name."""
    hosts = Path("/etc/hosts")
    names = [*NODES, SPARE]
    if not any(line.split()[1:] == names for line in hosts.read_text().splitlines()):
        with hosts.open("a") as file:
            file.write(f"127.0.0.1 {' '.join(names)}\n")
