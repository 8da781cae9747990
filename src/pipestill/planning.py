"""How long the stages that are to run will take on this machine, stage by stage and all together."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipestill import config
from pipestill.config import DataParams, Params
from pipestill.durations import duration
from pipestill.errors import InputError, PipestillError
from pipestill.estimating import Estimate, Sizes, makespan
from pipestill.pipeline import Pipeline, Stage
from pipestill.standing import Standing, open_any

if TYPE_CHECKING:
    from pipestill.data.source import Source

SECONDS = 3.0  # of timing networks
TRIED = 20  # images that are decoded to see how long one takes
DECODING = 0.001  # seconds of an image where none can be tried
EXAMPLES = {"digits": (1797, 10), "textures": (4000, 10)}  # images and classes
CLASSES = 10  # where their number is not known, which changes next to nothing


@dataclass(frozen=True)
class Images:
    """What is known of the images before they are stored; `sizes` is None where nothing is."""

    sizes: Sizes | None
    classes: int
    decode: float = DECODING  # seconds of an image


def to_run(stages: Pipeline) -> list[Stage]:
    """The stages that are not up to date."""
    current = {stage.address for stage in Standing(stages).current()}
    return [stage for stage in stages.stages if stage.address not in current]


def lines(stages: Pipeline, wanted: Collection[Stage], *, seconds: float = SECONDS) -> Iterator[str]:
    """A line for each stage that is to run, and one for all of them, from measurements of at most so many seconds."""
    params = config.check(config.parse_yaml(stages.text, "params.yaml"), "params.yaml", whole=True)
    begun = time.process_time()
    from pipestill import distributed
    from pipestill.stages import train  # noqa: F401  (what a stage imports)
    from pipestill.training.trial import Trial

    start = time.process_time() - begun
    images = images_of(stages.root, params)
    with distributed.world(device=params.operation.device, threads=1) as world:
        trial = Trial(params, images.classes, world, budget=seconds)
        speeds = trial.speeds([(stage.name, stage.entry) for stage in wanted], images.sizes, start, images.decode)
    have = len(os.sched_getaffinity(0))
    estimate = Estimate(params, images.sizes, speeds, have)
    ordered = list(wanted)
    each = [estimate.seconds(stage.name, stage.entry) for stage in ordered]
    width = max(len(stage.address) for stage in ordered)
    for stage, one in zip(ordered, each, strict=True):
        yield f"{stage.address:<{width}}  {'not known' if one is None else duration(one)}"
    places = {stage.address: place for place, stage in enumerate(ordered)}
    needs = [
        [places[source.address] for source in stages.upstream(stage) if source.address in places] for stage in ordered
    ]
    cores = [estimate.cores(stage.name, stage.entry) for stage in ordered]
    total = makespan([one or 0.0 for one in each], cores, needs, have)
    unknown = each.count(None)
    more = f", and {unknown} of which nothing is known" if unknown else ""
    count = "1 stage" if len(ordered) == 1 else f"{len(ordered)} stages"
    yield f"{'all':<{width}}  {duration(total)} on {have} cores ({count}{more})"


def images_of(root: Path, params: Params) -> Images:
    """The images of the dataset if it is there, else of what it will be made from."""
    try:
        artifact = open_any(root / "artifacts/dataset")
        if artifact.manifest.parameters == params.data.plain():
            summary = artifact.manifest.summary
            parts = [int(summary["parts"][part]) for part in ("train", "validation", "test")]
            return Images(Sizes(sum(parts), *parts), int(summary["classes"]))
    except (InputError, KeyError, TypeError):
        pass
    data, example = params.data, params.example
    if (root / data.path).exists():
        return _listed(data.model_copy(update={"path": str(root / data.path)}))
    if example is not None:
        total, classes = EXAMPLES[params.examples[example].kind]
    elif data.expect is not None:
        total, classes = data.expect.images, data.expect.classes
    else:
        return _unknown(data)
    return Images(_divided(data, total), classes if data.labels else 0)


def _listed(data: DataParams) -> Images:
    """The images that lie there, a few of them decoded."""
    from pipestill.data.sources import open_source

    try:
        source = open_source(data)
    except (PipestillError, OSError):  # the stage says what is wrong
        return _unknown(data)
    return Images(_divided(data, len(source.names)), len(source.classes), _decoding(source, data))


def _unknown(data: DataParams) -> Images:
    return Images(None, CLASSES if data.labels else 0)


def _divided(data: DataParams, total: int) -> Sizes:
    validation, test = (round(total * getattr(data.split, part, 0.0)) for part in ("validation", "test"))
    return Sizes(total, max(total - validation - test, 1), validation, test)


def _decoding(source: Source, data: DataParams) -> float:
    """Seconds in which an image is read and decoded; what cannot be decoded takes its time, too."""
    from pipestill.data.transforms import Form, Found, prepare

    form = Form.of(data)
    tried = range(0, len(source.names), max(len(source.names) // TRIED, 1))[:TRIED]
    begun = time.perf_counter()
    for index in tried:
        try:
            prepare(source.read(index), form, Found())
        except Exception:  # whatever a damaged file makes its decoder raise: the stage says it
            continue
    return (time.perf_counter() - begun) / len(tried)
