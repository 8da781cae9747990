"""How long the stages that are to run will take on this machine, stage by stage and all together."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from pipestill import config
from pipestill.config import Params
from pipestill.durations import duration
from pipestill.errors import InputError
from pipestill.estimating import Estimate, Sizes, makespan
from pipestill.pipeline import Pipeline, Stage
from pipestill.standing import Standing, open_any

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm"}
SECONDS = 6.0  # of measuring, so that a command with its start-up stays below 15
TRIED = 20  # images that are decoded to see how long one takes
EXAMPLES = {"digits": (1797, 10), "textures": (4000, 10)}  # images and classes


def to_run(stages: Pipeline) -> list[Stage]:
    """The stages that are not up to date."""
    current = {stage.address for stage in Standing(stages).current()}
    return [stage for stage in stages.stages if stage.address not in current]


def lines(stages: Pipeline, wanted: Collection[Stage], *, seconds: float = SECONDS) -> Iterator[str]:
    """A line for each stage that is to run, and one for all of them, from measurements of at most so many seconds."""
    params = config.check(config.parse_yaml(stages.text, "params.yaml"), "params.yaml")
    begun = time.process_time()
    from pipestill import distributed
    from pipestill.stages import train  # noqa: F401  (what a stage imports)
    from pipestill.training.trial import Trial

    start = time.process_time() - begun
    sizes, classes, decode = _sizes(stages.root, params)
    with distributed.world(device=params.operation.device, threads=1) as world:
        trial = Trial(params, classes, world, budget=seconds)
        speeds = trial.speeds([(stage.name, stage.entry) for stage in wanted], sizes, start, decode)
    estimate = Estimate(params, sizes, speeds)
    ordered = list(wanted)
    each = [estimate.seconds(stage.name, stage.entry) for stage in ordered]
    width = max(len(stage.address) for stage in ordered)
    for stage, one in zip(ordered, each, strict=True):
        yield f"{stage.address:<{width}}  {'not known' if one is None else duration(one)}"
    places = {stage.address: place for place, stage in enumerate(ordered)}
    needs = [
        [places[source.address] for source in stages.upstream(stage) if source.address in places] for stage in ordered
    ]
    have = len(os.sched_getaffinity(0))
    cores = [estimate.cores(stage.name, stage.entry) for stage in ordered]
    total = makespan([one or 0.0 for one in each], cores, needs, have)
    unknown = each.count(None)
    more = f", and {unknown} of which nothing is known" if unknown else ""
    count = "1 stage" if len(ordered) == 1 else f"{len(ordered)} stages"
    yield f"{'all':<{width}}  {duration(total)} on {have} cores ({count}{more})"


def _sizes(root: Path, params: Params) -> tuple[Sizes, int, float]:
    """Numbers of images and classes, and the seconds in which an image is decoded."""
    try:
        artifact = open_any(root / "artifacts/dataset")
        if artifact.manifest.parameters == params.data.plain():
            summary = artifact.manifest.summary
            parts = [int(summary["parts"][part]) for part in ("train", "validation", "test")]
            return Sizes(sum(parts), *parts), int(summary["classes"]), 0.001
    except (InputError, KeyError, TypeError):
        pass
    total, classes, decode = _counted(root, params)
    split = params.data.split
    validation, test = (round(total * getattr(split, part, 0.0)) for part in ("validation", "test"))
    return Sizes(total, max(total - validation - test, 1), validation, test), classes, decode


def _counted(root: Path, params: Params) -> tuple[int, int, float]:
    for name, example in params.examples.items():
        if params.data.path.startswith(f"data/{name}") and not (root / params.data.path).exists():
            return (*EXAMPLES.get(example.kind, (1000, 10)), 0.001)
    folder = root / params.data.path
    files = [
        Path(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    ]
    if not files:
        return 1000, 10, 0.001
    classes = len({file.relative_to(folder).parts[0] for file in files if file.parent != folder})
    return len(files), classes if params.data.labels else 0, _decoding(files[:: max(len(files) // TRIED, 1)][:TRIED])


def _decoding(files: list[Path]) -> float:
    from PIL import Image

    begun = time.perf_counter()
    for file in files:
        try:
            with Image.open(file) as image:
                image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
        except OSError:
            continue
    return (time.perf_counter() - begun) / len(files)
