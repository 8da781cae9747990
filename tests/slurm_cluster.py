"""A real Slurm of two nodes on this machine, in a folder of its own: Debian's slurm-wlm and munge, started as root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2")
CPUS = 2  # of each node, pretended or not
CONFIGURATION = """\
ClusterName=pipestill
SlurmctldHost=localhost
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
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
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000"


def missing() -> str | None:
    """What this machine lacks for a cluster, in words; None where nothing is."""
    programs = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    if programs:
        return f"no {', '.join(programs)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


class Cluster:
    """Its daemons run until `stop`; commands find it by SLURM_CONF."""

    def __init__(self, folder: Path, port: int = 17100) -> None:
        for part in ("control", *NODES):
            (folder / part).mkdir(parents=True)
        nodes = [NODE.format(name=name, port=port + 1 + index, cpus=CPUS) for index, name in enumerate(NODES)]
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.conf.write_text(CONFIGURATION.format(folder=folder, control=port, nodes="\n".join(nodes)))
        self.environment = {"SLURM_CONF": str(self.conf)}
        _authenticate()
        _name_hosts()
        self._call(["slurmctld", "-f", self.conf])
        for name in NODES:
            self.start_node(name)
        self.wait_for(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(NODES)))

    def start_node(self, name: str) -> None:
        self._call(["slurmd", "-f", self.conf, "-N", name])

    def _call(self, command: Sequence[object]) -> None:
        subprocess.run([str(word) for word in command], check=True, env=os.environ | self.environment, timeout=60)

    def call(self, *command: object) -> str:
        """What a command says."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, check=True, env=os.environ | self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def wait_for(self, condition: object, seconds: float = 60.0) -> None:
        limit = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < limit, f"nothing happened in {seconds} s:\n{self.call('squeue')}"
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends the daemons by the process ids that they left."""
        with suppress(subprocess.CalledProcessError):
            self.call("scancel", "--full", "--state=RUNNING", "--user=root")
        for name in (*NODES, "control"):
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)


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
    if not any(line.split()[1:] == list(NODES) for line in hosts.read_text().splitlines()):
        with hosts.open("a") as file:
            file.write(f"127.0.0.1 {' '.join(NODES)}\n")
