"""The parameters that a run started with, so that edits made while it runs do not reach its later stages.

Snakemake, `pipestill sync` and `pipestill repro` keep a copy under $PIPESTILL_RUNS and name it in PIPESTILL_PARAMS, and
their stages read the copy. DVC records what params.yaml holds when a stage ends, so under DVC a stage also fails if its
own parameters are no longer what they were when the run started.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill import config, digests
from pipestill.errors import InputError
from pipestill.work import runs_root, write_atomic

if TYPE_CHECKING:
    from pipestill.pipeline import Pipeline

PARAMS = "PIPESTILL_PARAMS"  # variable: the copy of params.yaml that stages of this run read
STAGE = "DVC_STAGE"  # variable that DVC sets for the stages it runs
FILE = Path("params.yaml")
STAGES = "stages.json"
SHOWN = 4  # changed parameters that a message names
ABSENT = object()  # stands for a parameter that is not set: None is a value


def parameters() -> Path:
    """The file that a stage reads: the run's copy if there is one, else params.yaml of the working directory."""
    return Path(os.environ.get(PARAMS, FILE))


def keep(text: str, stages: str = "") -> Path:
    """Copies the text of a params.yaml, and the stages resolved from it, below $PIPESTILL_RUNS; the copy's path."""
    folder = runs_root().absolute() / "started" / digests.of_bytes((text + stages).encode())[:16]
    if stages:
        write_atomic(folder / STAGES, stages)
    write_atomic(folder / FILE, text)
    return folder / FILE


def restored(root: Path) -> Pipeline | None:
    """The stages that were kept with this run's parameters; None where there is no such copy."""
    from pipestill import pipeline

    path = parameters()
    if path == FILE or not path.with_name(STAGES).exists():
        return None
    texts = (file.read_text(encoding="utf-8") for file in (path.with_name(STAGES), path))
    return pipeline.restored(root, *texts)


def differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Each parameter that differs, as `name was X, now Y`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            below = f"{key}.{name}".lstrip(".")
            yield from differences(before.get(name, ABSENT), after.get(name, ABSENT), below)
    elif before is not after and before != after:
        yield f"{key} was {_shown(before)}, now {_shown(after)}"


def listed(found: Sequence[str]) -> str:
    """Differences in one line, the first few by name."""
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "not set"
    if isinstance(value, Mapping):
        return "set"
    return json.dumps(value)


@dataclass(frozen=True)
class Held:
    """What DVC tracks for a running stage, as it was when `dvc repro` started."""

    names: tuple[str, ...]
    before: Any

    def check(self, *, ended: bool = False) -> None:
        """Raises InputError if params.yaml holds other values now."""
        after = config.read_parameters(FILE)
        pairs = ((name, value_at(self.before, name), value_at(after, name)) for name in self.names)
        found = [text for name, old, new in pairs for text in differences(old, new, name)]
        if found:
            restore = "Restore the old value"
            if ended:
                restore = "To keep this result, restore the old value and run pipestill record"
            raise InputError(
                f"params.yaml changed while DVC was running ({listed(found)}). {restore}, or run dvc repro again to "
                "use the new one."
            )


def by_dvc() -> Held | None:
    """Under DVC, takes the parameters that its run started with; None elsewhere.

    Raises InputError if the stage's own parameters have changed since.
    """
    address = os.environ.get(STAGE, "").rpartition(":")[2]
    if not address or not FILE.exists() or not Path("dvc.yaml").exists():
        return None
    if PARAMS not in os.environ:
        os.environ[PARAMS] = str(_copy_of_this_run())
    before = config.read_parameters(parameters())
    held = Held(tracked(Path("dvc.yaml"), address), before)
    held.check()
    return held


def tracked(definition: Path, address: str) -> tuple[str, ...]:
    """The names in params.yaml that DVC tracks for a stage, as dvc.yaml states them."""
    name, _, entry = address.partition("@")
    body = config.parse_yaml(definition.read_text(encoding="utf-8"), str(definition))["stages"].get(name) or {}
    stated = body.get("do", body).get("params", [])
    return tuple(text.replace("${key}", entry) for text in stated if isinstance(text, str))


def value_at(body: Any, name: str) -> Any:
    """The parameter of a full name in plain values; ABSENT where it is not set."""
    for part in name.split("."):
        if not isinstance(body, Mapping) or part not in body:
            return ABSENT
        body = body[part]
    return body


def _copy_of_this_run() -> Path:
    """The copy that the first stage of this DVC process made."""
    host = digests.of_bytes(socket.gethostname().encode())[:8]
    here, place = f"dvc-{host}-", runs_root().absolute() / "started"
    run = _dvc_process()
    project = digests.of_bytes(bytes(Path.cwd()))[:8]  # a worker of DVC's queue runs one experiment after the other
    copy = place / f"{here}{run}-{project}" / FILE
    for other in place.glob(f"{here}*"):
        pid, began, _ = other.name.removeprefix(here).split("-")
        if _process(int(pid))[1] != began:
            shutil.rmtree(other, ignore_errors=True)
    if not copy.exists():
        write_atomic(copy, FILE.read_bytes())
    return copy


def _dvc_process() -> str:
    """Number and start of the DVC that started this stage: the first process above that is not in a stage itself."""
    pid = os.getppid()
    while pid > 1 and f"\0{STAGE}=".encode() in _variables(pid):
        pid = _process(pid)[0]
    return f"{pid}-{_process(pid)[1]}"


def _process(pid: int) -> tuple[int, str]:
    """A process's parent and when it began, in the kernel's ticks; nothing for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[1]), fields[19]
    except (OSError, ValueError, IndexError):
        return 0, ""


def _variables(pid: int) -> bytes:
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
