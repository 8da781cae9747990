"""A copy of the project in a folder of its own, and the three ways to run it there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import forked

ROOT = Path(__file__).parent.parent
LINKS = ("local", "slurm")  # to the profiles, for their short names
PARTS = ("Snakefile", "dvc.yaml", ".dvcignore", ".gitignore", "workflow", "cluster_profiles", "conf", "params.yaml")
WRITTEN_ONCE = ("data", ".dvc/cache", ".git/objects")  # thousands of small files, replaced but never changed
TINY = ("experiment=miniature", "~distillation.students.student-10", "~sampling.runs.student-10")
PIPESTILL = (sys.executable, "-m", "pipestill")
BY_HAND = """
import json, sys
from pipestill import cli
sys.exit(max(cli.main(arguments) for arguments in json.loads(sys.argv[1])))
"""


class Project:
    """A git checkout of the pipeline in a folder; every command runs there as a process of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(
        self, *command: str, code: int = 0, timeout: float | None = None, fresh: bool = False, **environment: str
    ) -> str:
        """Output and errors of a command that must end with `code`, within `timeout` seconds.

        `pipestill`, `snakemake` and `dvc`, also where one starts another, are forked (forked.py) unless `fresh`.
        """
        stand_in = None if fresh else forked.stand_in()
        programs = [str(folder) for folder in (stand_in, Path(sys.executable).parent) if folder]
        path = os.pathsep.join([*programs, os.environ["PATH"]])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIPESTILL_", "DVC_"))}
        own = {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PIPESTILL_ESTIMATE": "0"}
        variables = inherited | own | environment
        with tempfile.TemporaryFile("w+") as output:
            process: forked.Process | subprocess.Popen[bytes] | None = None
            words = ("pipestill", *command[3:]) if command[:3] == PIPESTILL else command
            if words[0] in forked.KINDS and not fresh:
                process = forked.start(words[0], words[1:], variables, output=output, folder=self.root)
            process = process or subprocess.Popen(
                command, cwd=self.root, env=variables, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                ended = process.wait(timeout)
            finally:
                process.kill()
            output.seek(0)
            said = output.read()
        assert ended == code, f"{shlex.join(command)} ended with {ended}:\n{said[-6000:]}"
        return said

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
        return self.run("git", *identity, *arguments)

    def commit(self, message: str = "change") -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)

    def snakemake(self, *arguments: str, code: int = 0, **environment: str) -> str:
        return self.run("snakemake", "--profile", "local", *arguments, code=code, **environment)

    def dvc(self, *arguments: str, code: int = 0) -> str:
        return self.run("dvc", *arguments, code=code)

    def pipestill(self, *arguments: str, code: int = 0, **environment: str) -> str:
        return self.run(*PIPESTILL, *arguments, code=code, **environment)

    def by_hand(self, *addresses: str) -> str:
        """Runs the commands of dvc.yaml, all or those named, one after the other without either tool."""
        stages = dvc_stages(self.root)
        chosen = addresses or tuple(stages)
        commands = [shlex.split(stages[address]["command"])[1:] for address in chosen]
        return self.run(sys.executable, "-c", BY_HAND, json.dumps(commands))

    def here(self, *arguments: str, code: int = 0) -> str:
        """Output and errors of a `pipestill` command in this process, which has imported everything already."""
        from pipestill import cli

        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIPESTILL_", "DVC_"))}
        said = io.StringIO()
        with (
            contextlib.chdir(self.root),
            forked.children_forked(),
            mock.patch.dict(os.environ, inherited, clear=True),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            ended = cli.main(list(arguments))
        assert ended == code, f"pipestill {shlex.join(arguments)} ended with {ended}:\n{said.getvalue()[-6000:]}"
        return said.getvalue()

    def by_hand_here(self, *addresses: str) -> None:
        """As `by_hand`, in this process."""
        stages = dvc_stages(self.root)
        for address in addresses or tuple(stages):
            self.here(*shlex.split(stages[address]["command"])[1:])

    def planned(self, *arguments: str) -> dict[str, dict[str, set[str] | str]]:
        """The jobs that a dry run plans, by DVC's name for the stage: inputs, outputs and the stage's command."""
        return jobs_in(self.snakemake("--dry-run", "--printshellcmds", "--quiet", "host", *arguments))

    def unfinished_for_dvc(self) -> set[str]:
        """The stages that `dvc status` would run."""
        status = json.loads(self.dvc("status", "--json"))
        return {address.removeprefix("dvc.yaml:") for address in status}

    def payloads(self) -> dict[str, str]:
        """The payload digest of every artefact, by its folder."""
        manifests = [*self.root.glob("data/*/manifest.json"), *self.root.glob("artifacts/**/manifest.json")]
        return {
            str(manifest.parent.relative_to(self.root)): json.loads(manifest.read_text())["payload"]
            for manifest in manifests
        }

    def copy(self, to: Path) -> Project:
        """The whole folder once more, times and caches included; what nothing writes twice is linked."""
        shutil.copytree(self.root, to, symlinks=True, copy_function=self._copy_or_link)
        return Project(to)

    def _copy_or_link(self, source: str, target: str) -> None:
        below = Path(source).relative_to(self.root)
        once = any(below.is_relative_to(folder) for folder in WRITTEN_ONCE)
        (os.link if once else shutil.copy2)(source, target)

    def edit(self, name: str, old: str, new: str) -> None:
        """Replaces the only occurrence of a text in a file."""
        text = (self.root / name).read_text()
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {name}"
        (self.root / name).write_text(text.replace(old, new))


def make_project(root: Path, *overrides: str) -> Project:
    """A fresh git checkout of the pipeline with the given parameters."""
    project = Project(root)
    lay_out(root)
    (root / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy2(ROOT / ".dvc" / name, root / ".dvc" / name)
    project.git("init", "--quiet", "--initial-branch", "main")
    if overrides:
        project.pipestill("config", "--force", *overrides)
    project.commit("a fresh checkout")
    return project


def make_tiny(root: Path) -> Project:
    """A finished, recorded and committed pipeline of one student whose stages take a second each at most."""
    project = make_project(root, *TINY)
    project.by_hand_here()
    project.here("record")
    project.here("sync")
    project.commit("results")
    return project


def lay_out(root: Path) -> None:
    """The pipeline's files in a folder, without git and DVC."""
    root.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, root / part)
    shutil.copytree(ROOT / "src" / "pipestill" / "stages", root / "src/pipestill/stages")
    for link in LINKS:
        (root / link).symlink_to((ROOT / link).readlink())


def jobs_in(text: str) -> dict[str, dict[str, set[str] | str]]:
    """The jobs that Snakemake's output with `--printshellcmds` names."""
    jobs = {}
    for block in re.split(r"^\[.*\]\n", text, flags=re.MULTILINE)[1:]:
        fields = dict(re.findall(r"^    (\w+): (.*)$", block, flags=re.MULTILINE))
        found = re.search(r"^(?:local)?rule (\w+):", block, flags=re.MULTILINE)
        if block.startswith("Finished jobid"):
            continue
        assert found, block
        if found[1] == "all":
            continue
        entry = fields.get("wildcards", "").removeprefix("name=")
        command = re.search(r"^Shell command: (.*)$", block, flags=re.MULTILINE)
        assert command, block
        jobs[f"{found[1]}@{entry}" if entry else found[1]] = {
            "inputs": set(filter(None, fields.get("input", "").split(", "))),
            "outputs": set(fields["output"].split(", ")),
            "command": shlex.split(command[1])[-1],
            "threads": fields.get("threads", "1"),
        }
    return jobs


def dvc_stages(root: Path) -> dict[str, dict[str, object]]:
    """What DVC itself resolves dvc.yaml to: command, dependencies and outputs of each stage, metrics apart."""
    from dvc.dependency import ParamsDependency
    from dvc.repo import Repo

    stages = {}
    with Repo(str(root)) as repo:
        for stage in repo.index.stages:
            files = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
            stages[stage.name] = {
                "command": stage.cmd,
                "dependencies": {os.path.relpath(dep.fs_path, root) for dep in files},
                "outputs": {os.path.relpath(out.fs_path, root) for out in stage.outs if not out.metric},
            }
    return stages
