"""Writes an embedded example (see `examples` in the parameters) as a folder of PNGs by class, ready for the dataset
stage: set data.path to OUTPUT/images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipestill.artifacts import Artifact
from pipestill.config import ExampleParams
from pipestill.progress import say
from pipestill.stages import common
from pipestill.work import open_work, writing

VERSION = 1
EXAMPLES = """
  pipestill example --name digits --output data/digits
  pipestill example --name textures --output data/textures examples.textures.patch=32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_common(parser, makes="images", name="the entry of `examples`")


def main(options: argparse.Namespace) -> int:
    params = common.load_params(options)
    write_example(common.entry(params.examples, options.name, "examples"), options.output)
    return 0


def write_example(example: ExampleParams, output: Path) -> Artifact:
    """Writes the example as an artefact of kind `images`, or finds it there."""
    with open_work(
        kind="images",
        stage="example",
        version=VERSION,
        parameters=example.plain(),
        inputs={},
        output=output,
    ) as work:
        if work.done is not None:
            say(f"{output} is there and verifies: nothing to do")
            return work.done
        from PIL import Image

        from pipestill.data.examples import example_images

        staging, count = work.staging(), 0
        for name, pixels in example_images(example):
            file = staging / "images" / name
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
            count += 1
        artifact = work.publish(staging, {"images": count})
        work.record(finished=True, images=count)
    say(f"{output}: {count} images")
    return artifact
