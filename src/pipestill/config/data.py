"""Parameters of where images come from, and of outside files."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pipestill.artifacts import LICENCE, MANIFEST
from pipestill.config.fields import Background, Count, Fraction, PathText, Positive, Section, Seed


class ExampleParams(Section):
    """An embedded data set, written out as a folder of PNGs by class."""

    kind: Literal["digits", "textures"]
    patch: Literal[16, 32] = 16  # textures: side of a patch, pixels
    stride: Positive = 8  # textures: step between training patches, pixels


class SplitParams(Section):
    """How images are split into train, validation and test; `folder` takes the source's own top-level folders."""

    by: Literal["fraction", "folder", "none"] = "fraction"
    validation: Fraction = 0.15
    test: Fraction = 0.30
    seed: Seed = 0
    together: Literal["none", "repeats", "near"] = "none"  # images that stay in one part: equal ones, or near pairs too

    @model_validator(mode="after")
    def _some_left_to_train(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must leave something to train on (their sum is below 1)")
        return self

    @model_validator(mode="after")
    def _kept_together_where_drawn(self) -> Self:
        if self.by != "fraction" and self.together != "none":
            why = "folders say where each image goes" if self.by == "folder" else "all images are trained on"
            raise ValueError(f"together={self.together} needs by=fraction: {why}; set data.split.together=none")
        return self


class ExpectParams(Section):
    """What a well-known data set has; anything else is refused."""

    images: Positive
    classes: Count


class DataParams(Section):
    """The dataset stage: where the images are and how they are stored."""

    path: PathText
    format: Literal["folder", "edm", "npz", "lmdb"] = "folder"
    resolution: Annotated[int, Field(ge=4, le=4096)]
    color: Literal["grey", "rgb"] = "rgb"
    transform: Literal["none", "center-crop", "center-crop-adm"] = "center-crop"
    filter: Literal["box", "bilinear", "bicubic", "lanczos"] = "box"
    background: Background = "refuse"  # behind transparent pixels: white, black, "#rrggbb"; refuse: they are bad
    on_bad: Literal["refuse", "set-aside"] = "refuse"
    labels: bool = True
    class_names: PathText | None = None  # a file with a class a line, for formats that number them
    expect: ExpectParams | None = None
    split: SplitParams = SplitParams()
    near_duplicate_bits: Annotated[int, Field(ge=0, le=16)] = 2  # Hamming distance of 64-bit difference hashes
    images_per_value: Positive = 85

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if self.class_names is not None and (self.format == "folder" or not self.labels):
            raise ValueError("class_names is for formats that number their classes (edm, npz, lmdb) and have labels")
        return self


class FetchedFile(Section):
    """One outside file: where it comes from, what it is called in the artefact, and what it must be."""

    path: Annotated[str, StringConstraints(pattern=r"^[\w][\w.+-]*(/[\w][\w.+-]*)*$")]  # hub: also its path there
    source: Literal["hub", "https", "path"]
    location: str  # hub: OWNER/NAME; https: the address; path: the file
    revision: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] | None = None  # hub: the commit
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    size: Count | None = None  # bytes

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Self:
        if self.path.split("/")[0] in (MANIFEST, LICENCE):
            raise ValueError(f"path={self.path} is a file of the artefact's own: give it another name")
        local = ("http://127.0.0.1", "http://localhost")
        if self.source == "https" and not self.location.startswith(("https://", *local)):
            raise ValueError(f"location={self.location} is no https address")
        return self

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if (self.source == "hub") != (self.revision is not None):
            raise ValueError(
                "source=hub and revision (a commit) belong together: a branch's name would change its meaning"
            )
        return self


class FetchParams(Section):
    """Outside files that are fetched, checked and kept as they are."""

    files: Annotated[tuple[FetchedFile, ...], Field(min_length=1)]
    licence: str = ""  # under which the files may be used

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        names = [file.path for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError(f"two files have the same path ({', '.join(names)})")
        for name in names:
            if any(other.startswith(f"{name}/") for other in names):
                raise ValueError(f"{name} is a file and a folder of others")
        if not self.licence.isprintable():
            raise ValueError("licence has to be one line")
        return self
