"""Batches are a pure function of the step, whatever the cache, the number of ranks, or where training resumes."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch

from images import class_folders, data_params
from pipestill.data import order
from pipestill.data.loader import Loader
from pipestill.data.store import Dataset, open_dataset
from pipestill.errors import InputError
from pipestill.stages.dataset import build

CPU = torch.device("cpu")
CACHES = ["device", "host", "none"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("loader")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_RUNS", str(folder / "runs"))
        class_folders(folder / "photos", each=20)
        build(data_params(folder / "photos", images_per_value=7), folder / "dataset")
    return open_dataset(folder / "dataset")


def loader(dataset: Dataset, cache: Any = "host", **changes: Any) -> Loader:
    return Loader(dataset, "train", **{"batch": 6, "seed": 3, "cache": cache, "device": CPU} | changes)


@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_is_what_the_order_says(dataset: Dataset, cache: str) -> None:
    train = dataset.split["train"]
    count = len(train)
    for step in (0, 3, 40):  # the first, one that spans two epochs, a late one
        batch = loader(dataset, cache).batch(step)
        assert batch.positions.tolist() == list(range(6 * step, 6 * step + 6))
        chosen = train[[order.permutation(count, 3, p // count)[p % count] for p in batch.positions.tolist()]]
        wanted = dataset.images(chosen).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()
        assert (batch.images.numpy() == wanted).all()
        assert batch.labels.tolist() == dataset.labels[chosen].tolist()
    assert (6 * 3) // count != (6 * 3 + 5) // count


def test_an_epoch_shows_every_training_image_once(dataset: Dataset) -> None:
    epoch = loader(dataset, batch=len(dataset.split["train"])).batch(2).images.numpy()
    shown = {image.tobytes() for image in epoch}
    assert len(shown) == len(dataset.split["train"]) == 22


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_see_the_batch_of_one(dataset: Dataset, size: int) -> None:
    for step in (0, 5):
        whole = loader(dataset).batch(step)
        shares = [loader(dataset, rank=rank, size=size).batch(step) for rank in range(size)]
        for field in ("images", "labels", "positions"):
            assert torch.equal(torch.cat([getattr(share, field) for share in shares]), getattr(whole, field))


@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_is_the_same_whatever_was_asked_for_before(dataset: Dataset, cache: str) -> None:
    batches = loader(dataset, cache)
    for step in (4, 5, 6, 2, 3, 9, 4):
        batch, wanted = batches.batch(step), loader(dataset).batch(step)
        assert torch.equal(batch.images, wanted.images)
        assert torch.equal(batch.positions, wanted.positions)


def test_the_next_batch_is_read_while_this_one_is_in_use(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Dataset.images
    batches, seen = loader(dataset, "none"), threading.Semaphore(0)

    def watched(self: Dataset, indices: Any) -> Any:
        found = read(self, indices)
        seen.release()
        return found

    monkeypatch.setattr(Dataset, "images", watched)
    batches.batch(0)
    assert seen.acquire(timeout=60)
    assert seen.acquire(timeout=60)  # step 1, which nobody has asked for yet


def test_what_goes_wrong_in_the_thread_is_raised(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = loader(dataset, "none")

    def fail(self: Dataset, indices: Any) -> Any:
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(Dataset, "images", fail)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        batches.batch(0)


def test_what_cannot_be_is_refused(dataset: Dataset) -> None:
    with pytest.raises(InputError, match="batch of 6 cannot be shared by 4 ranks"):
        loader(dataset, size=4)
    empty = dataclasses.replace(dataset, parts=np.zeros(40, dtype=np.uint8))
    with pytest.raises(InputError, match="no image in its validation part"):
        Loader(empty, "validation", batch=1, seed=0, cache="none", device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("cache", CACHES)
def test_a_gpu_gets_the_batches_of_the_cpu(dataset: Dataset, cache: str) -> None:
    wanted = loader(dataset)
    batches = loader(dataset, cache, device=torch.device("cuda", 0))
    for step in range(10):
        batch = batches.batch(step)
        assert batch.images.is_cuda
        assert batch.labels.is_cuda
        assert torch.equal(batch.images.cpu(), wanted.batch(step).images)
        assert torch.equal(batch.labels.cpu(), wanted.batch(step).labels)
