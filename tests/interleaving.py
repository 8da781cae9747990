"""Rounds of small changes, each run by a tool drawn at random: after each, nothing stale and nothing run in vain."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from pipestill import pipeline
from workflow_project import TINY, Project, jobs_in

CHANGES = {  # what may change, and the values that it takes; the first are those at the beginning
    "distillation.students.student-4.generator_lr": ("1e-04", "0.01", "0.02"),
    "sampling.runs.student-4.seeds": ("[0]", "[1]", "[2]"),
    "sampling.runs.teacher-2m-4.seeds": ("[0]", "[1]"),
    "report.title": ("Miniature", "Another", "Third"),
}
WAYS = ("snakemake", "dvc", "hand", "checkout")  # each once before one comes again
Values = dict[str, str]


@dataclass
class Interleaving:
    """A project that is changed and run, one that is always run by hand, and what should stand in the first."""

    project: Project
    clean: Project
    chance: random.Random
    values: Values = field(default_factory=lambda: {name: values[0] for name, values in CHANGES.items()})
    history: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ways: list[str] = []
        self._payloads: dict[str, dict[str, str]] = {}
        self._commits: list[tuple[str, Values, dict[str, str]]] = []
        self.stages = {stage.address: stage for stage in pipeline.load(self.project.root).stages}
        self.standing = self.wanted()  # the signature that each artefact was made with
        self.recorded = set(self.standing.values())
        self._commit()

    def wanted(self) -> dict[str, str]:
        """A signature of each stage under the present values: its own, with those of all that it comes from."""
        resolved = pipeline.load(self.project.root)
        signatures: dict[str, str] = {}

        def sign(stage: pipeline.Stage) -> str:
            if stage.address not in signatures:
                above = [sign(source) for source in resolved.upstream(stage)]
                own = json.dumps([stage.address, stage.parameters, stage.version, sorted(above)], sort_keys=True)
                signatures[stage.address] = own
            return signatures[stage.address]

        for stage in resolved.stages:
            sign(stage)
        return signatures

    def round(self) -> None:
        """One change, or none, one way to run what is out of date, and the checks."""
        if not self._ways:
            self._ways = self.chance.sample(WAYS, len(WAYS))
        way = self._ways.pop()
        if way == "checkout":
            if len(self._commits) > 1:
                self._back_to_a_commit()
                return
            way = "hand"  # there is nothing to go back to yet
        self.project.here("config", *TINY, *self._change())
        wanted = self.wanted()
        parts = [address for address in self.stages if address.startswith(("distill", "sample", "evaluate"))]
        target = self.chance.choice([None] * 2 * len(parts) + parts)
        needed = self._closure(target)
        stale = {address for address in needed if self.standing[address] != wanted[address]}
        self.history.append(f"{way} {target or 'all'}: {[*self.values.values()]}: {len(stale)} stale")
        before = self._worked()
        if way == "snakemake":
            started, restored = self._by_snakemake(target)
        elif way == "dvc":
            started, restored = self._by_dvc(target)
        else:
            started, restored = self._by_hand(needed)
        self.standing |= {address: wanted[address] for address in stale}
        known = {address for address in stale if wanted[address] in self.recorded}
        self.recorded |= {self.standing[address] for address in needed}
        after = self._worked()
        worked = {after[path][1] for path in after if path not in before or after[path][0] != before[path][0]}
        if way == "dvc":  # its run-cache has what was recorded
            self._is("restored", restored, known)
            self._is("worked", worked, stale - known)
            self._is("started", started, stale - known)
        else:
            self._is("worked", worked, stale)
            self._is("started", started - self._after(stale), set())
        self._check_payloads(wanted)
        self._commit()

    def finish(self) -> None:
        """At the end, with everything run, no tool has anything to do."""
        if self.standing != self.wanted():
            self.project.snakemake()
            self.standing = self.wanted()
            self._check_payloads(self.standing)
        self._is("unfinished for DVC", self.project.unfinished_for_dvc(), set())
        self._is("planned by Snakemake", set(self.project.planned()), set())

    def _change(self) -> list[str]:
        """Changes one value, or none, or goes back to the first ones; returns the overrides."""
        name = self.chance.choice([*CHANGES, *CHANGES, "nothing", "first values"])
        if name in CHANGES:
            others = [value for value in CHANGES[name] if value != self.values[name]]
            self.values = self.values | {name: self.chance.choice(others)}
        elif name == "first values":
            self.values = {key: values[0] for key, values in CHANGES.items()}
        return [f"{key}={value}" for key, value in self.values.items()]

    def _closure(self, target: str | None) -> list[str]:
        """A stage with all that it comes from, in DVC's order; all stages where none is named."""
        if target is None:
            return list(self.stages)
        resolved = pipeline.load(self.project.root)
        found, left = {target}, [target]
        while left:
            for source in resolved.upstream(self.stages[left.pop()]):
                if source.address not in found:
                    found.add(source.address)
                    left.append(source.address)
        return [address for address in self.stages if address in found]

    def _after(self, addresses: set[str]) -> set[str]:
        """Stages and all that comes from them: where Snakemake may start one whose artefact turns out to stand."""
        return {stage for stage in self.stages if addresses & set(self._closure(stage))}

    def _by_snakemake(self, target: str | None) -> tuple[set[str], set[str]]:
        targets = [self.stages[target].manifest] if target else []
        said = self.project.snakemake(*targets, "--printshellcmds", "--quiet", "host")
        return set(jobs_in(said)), set()

    def _by_dvc(self, target: str | None) -> tuple[set[str], set[str]]:
        targets = [target] if target else []
        if self.chance.random() < 0.5:
            said = self.project.dvc("repro", *targets)
        else:
            said = self.project.pipestill("repro", *targets)
        self.project.here("sync")
        started = set(re.findall(r"Running stage '([^']+)'", said))
        return started, set(re.findall(r"Stage '([^']+)' is cached", said))

    def _by_hand(self, needed: list[str]) -> tuple[set[str], set[str]]:
        self.project.by_hand_here(*needed)
        self.project.here("record")
        self.project.here("sync")
        return set(), set()

    def _back_to_a_commit(self) -> None:
        """`git checkout` of an earlier round's results, `dvc checkout`, and sync: nothing runs."""
        commit, self.values, standing = self.chance.choice(self._commits[:-1])
        self.history.append(f"checkout {commit[:7]}: {[*self.values.values()]}")
        before = self._worked()
        self.project.git("checkout", "--quiet", commit, "--", ".")
        self.project.dvc("checkout", "--quiet", "--force")
        self.project.here("sync")
        self._is("worked", self._worked(), before)
        self.standing = dict(standing)
        self._check_payloads(self.wanted())
        self._commit()

    def _commit(self) -> None:
        self.project.commit("a round")
        commit = self.project.git("rev-parse", "HEAD").strip()
        self._commits.append((commit, self.values, dict(self.standing)))

    def _worked(self) -> dict[str, tuple[int, str]]:
        """Each piece of work that finished here: when its record was written, and the stage's address."""
        found = {}
        by_output = {stage.output: stage.address for stage in self.stages.values()}
        for record in (self.project.root / "runs").glob("*/*/record.json"):
            output = Path(json.loads(record.read_text())["output"])
            if output.is_relative_to(self.project.root):
                address = by_output[str(output.relative_to(self.project.root))]
                found[str(record)] = (record.stat().st_mtime_ns, address)
        return found

    def _check_payloads(self, wanted: dict[str, str]) -> None:
        """Whatever stands as wanted has the bytes of a run by hand under the same parameters."""
        text = (self.project.root / "params.yaml").read_text()
        if text not in self._payloads:
            (self.clean.root / "params.yaml").write_text(text)
            self.clean.by_hand_here()
            self._payloads[text] = self.clean.payloads()
        payloads = self.project.payloads()
        for address, stage in self.stages.items():
            if self.standing[address] == wanted[address]:
                self._is(f"payload of {address}", payloads[stage.output], self._payloads[text][stage.output])

    def _is(self, what: str, found: object, expected: object) -> None:
        assert found == expected, "\n".join(
            [f"{what}: {found!r}, expected {expected!r}, after", *(f"  {line}" for line in self.history)]
        )


def interleave(tiny: Project, folder: Path, *, seed: int, rounds: int) -> None:
    """So many rounds from a finished project; a failure prints the seed and what was done."""
    project, clean = tiny.copy(folder / "project"), tiny.copy(folder / "clean")
    shutil.rmtree(project.root / "runs")
    story = Interleaving(project, clean, random.Random(seed))
    story.history.append(f"seed {seed}")
    for _ in range(rounds):
        story.round()
    story.finish()
