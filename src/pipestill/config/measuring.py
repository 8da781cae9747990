"""Parameters of what images are measured against, and of the report."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from pipestill.config.fields import ExtractorName, MixName, Once, PathText, Positive, Rate, Section, Seed


class ClassifierParams(Section):
    """The small classifier whose penultimate features and predictions judge class-conditional samples."""

    channels: tuple[Positive, ...] = (32, 64)
    features: Positive = 64
    iterations: Positive = 600
    batch: Positive = 128
    learning_rate: Rate = 2e-3
    seed: Seed = 0


class ProtocolParams(Section):
    """How figures are measured; the reference artefact carries it to whoever measures against it."""

    extractors: Annotated[tuple[ExtractorName, ...], Once] = ("classifier", "efficientnet_lite0")
    inception_weights: PathText | None = None  # path of torch-fidelity's weights file, for the `inception` extractor
    kid_subsets: Positive = 50
    kid_subset_size: Positive = 100
    neighbours: Positive = 3  # k of improved precision and recall
    seed: Seed = 0


class FloorParams(Section):
    """Real-against-real figures: draws from train, measured against test, at the counts and class mixes in use."""

    counts: Annotated[tuple[Positive, ...], Once] = (500,)
    plans: Annotated[tuple[MixName, ...], Field(min_length=1), Once] = ("balanced",)  # follows the plans of the runs
    draws: Positive = 5


class ReferenceParams(Section):
    protocol: ProtocolParams = ProtocolParams()
    classifier: ClassifierParams = ClassifierParams()
    floor: FloorParams = FloorParams()
    statistics: PathText | None = None  # an EDM npz with mu and sigma, read for the `inception` extractor
    files: Annotated[str, StringConstraints(pattern=r"^(dataset|fetched/[a-z0-9][a-z0-9-]*)$")] = "dataset"  # follows
    batch: Positive = 256
    threads: Positive = 1


class EvaluationParams(Section):
    batch: Positive = 256
    threads: Positive = 1


class ReportParams(Section):
    title: str = "pipestill"
    grid_rows: Positive = 10
    grid_columns: Positive = 10
