"""Feature tables: blocks shared by ranks, gone on with after a kill, stopped on request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipestill.distributed import World
from pipestill.errors import Stopped
from pipestill.evaluation.extractors import Extractor
from pipestill.evaluation.tables import extract


def sums(name: str = "sums") -> Extractor:
    """Two numbers an image: its first pixel, and that pixel's square."""

    def forward(images: Tensor) -> Tensor:
        first = images[:, 0, 0, 0].float()
        return torch.stack([first, first.square()], dim=1)

    return Extractor(name, 2, torch.device("cpu"), "for the test", forward, batch=3)


def pixels(first: int, last: int) -> Tensor:
    return torch.arange(first, last, dtype=torch.uint8).reshape(-1, 1, 1, 1)


def rows(count: int) -> Tensor:
    first = torch.arange(count, dtype=torch.float32)
    return torch.stack([first, first.square()], dim=1)


def alone() -> World:
    return World(0, 1, torch.device("cpu"))


def test_tables_hold_every_image_in_order(tmp_path: Path) -> None:
    tables = extract(tmp_path, "test", [sums("a"), sums("b")], pixels, 23, block=5, world=alone())
    assert list(tables) == ["a", "b"]
    assert torch.equal(tables["a"], rows(23))
    assert torch.equal(tables["b"], rows(23))


def test_finished_blocks_are_not_done_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def until(limit: int) -> object:
        def images(first: int, last: int) -> Tensor:
            if first >= limit:
                raise KeyboardInterrupt
            asked.append(first)
            return pixels(first, last)

        return images

    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, "test", [sums()], until(10), 23, block=5, world=alone())  # type: ignore[arg-type]
    assert asked == [0, 5]
    with (tmp_path / "test.done-0").open("a") as log:
        log.write("2")  # a line that a power cut shortened counts for nothing
    (tmp_path / "test.done-1").write_text("4\n3")
    tables = extract(tmp_path, "test", [sums()], until(99), 23, block=5, world=alone())  # type: ignore[arg-type]
    assert asked == [0, 5, 10, 15]
    assert torch.equal(tables["sums"][:20], rows(23)[:20])
    assert (tmp_path / "test.done-0").read_text() == "0\n1\n4\n2\n3\n"


def test_marks_without_their_table_count_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "test.done-0").write_text("0\n1\n")
    assert torch.equal(extract(tmp_path, "test", [sums()], pixels, 12, block=5, world=alone())["sums"], rows(12))


def test_a_stop_request_ends_it_with_what_is_done_kept(tmp_path: Path) -> None:
    world = alone()

    def images(first: int, last: int) -> Tensor:
        if first == 5:
            world.stop.reason = "SIGTERM"
        return pixels(first, last)

    with pytest.raises(Stopped, match="SIGTERM"):
        extract(tmp_path, "test", [sums()], images, 23, block=5, world=world)
    assert (tmp_path / "test.done-0").read_text() == "0\n1\n"
