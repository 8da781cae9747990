"""Sampling in one process: plans, recipes, blocks handed out and written, and the artefact that comes of them."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipestill import artifacts, counter, distributed
from pipestill.config import ChurnParams, OperationParams, RunParams
from pipestill.diffusion.schedules import karras
from pipestill.distributed import World
from pipestill.errors import InputError, Stopped, SurroundingsError
from pipestill.networks.model import NativeSchedule, load_model, read_card
from pipestill.sampling import plan, store
from pipestill.sampling.items import sample_items, to_uint8
from pipestill.sampling.pictures import grid
from pipestill.sampling.plan import Block
from pipestill.sampling.recipe import settle
from pipestill.sampling.runner import read_blocks, run_blocks
from pipestill.sampling.store import open_samples, write_features, write_samples
from pipestill.sampling.writer import BlockWriter, block_file
from pipestill.stages.sample import sample
from pipestill.work import read_record
from tiny_models import CLASSES, make_model

CPU = OperationParams(device="cpu")
NATIVE = NativeSchedule(steps=3, transition="renoise", sigma_max=8.0, sigma_min=0.05, rho=7.0)


def run_params(**changes: Any) -> RunParams:
    body = {"model": "teacher", "sampler": "euler", "steps": 3, "sigmas": "models/teacher", "images": 10}
    return RunParams(**(body | {"micro_batch": 4} | changes))


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "teacher").path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "student", native=NATIVE, unconditional=False).path


# --- plans


def test_a_listed_plan_takes_the_list_in_turn() -> None:
    assert plan.listed(7, (2, 0, 2)).tolist() == [2, 0, 2, 2, 0, 2, 2]


def test_blocks_cover_each_seed_in_item_order() -> None:
    blocks = plan.blocks((5, 1), 10, 4)
    assert [(block.seed, block.first, block.count) for block in blocks] == [
        (seed, first, count) for seed in (5, 1) for first, count in ((0, 4), (4, 4), (8, 2))
    ]
    assert len({block.name for block in blocks}) == 6


# --- items


def test_uint8_rounds_and_clips() -> None:
    levels = torch.arange(256)
    exact = levels.float() / 127.5 - 1
    assert torch.equal(to_uint8(exact), levels.to(torch.uint8))
    assert torch.equal(to_uint8(exact + 0.003), levels.to(torch.uint8))  # within half a level
    assert to_uint8(torch.tensor([-1.4, 1.2, 0.0])).tolist() == [0, 255, 128]


def test_items_start_and_step_by_their_own_noise(student: Path) -> None:
    """Against the samplers' formula written out, one item at a time."""
    model = load_model(student)
    sigmas, items, labels = karras(NATIVE.steps, 0.05, 8.0), torch.tensor([3, 11, 4]), torch.tensor([0, 2, 1])
    recipe = settle(run_params(sampler="native", steps=None, model="student", sigmas="models/student"), model.card)
    cpu = torch.device("cpu")
    got = recipe.sample(model.denoiser, seed=9, items=items, labels=labels, device=cpu)
    levels = sigmas.tolist()
    x = levels[0] * counter.normal(9, "latent", items, (1, 8, 8))
    for i in range(3):
        x0 = model.denoiser(x, torch.full((3,), levels[i]), model.card.condition(labels))
        x = x0 + levels[i + 1] * counter.normal(9, "step", items, (1, 8, 8), draw=i)
    assert torch.equal(got, x)
    order = torch.tensor([2, 0, 1])
    again = recipe.sample(model.denoiser, seed=9, items=items[order], labels=labels[order], device=cpu)
    torch.testing.assert_close(again, got[order], rtol=1e-5, atol=1e-6)


def test_no_gradient_is_kept(teacher: Path) -> None:
    model = load_model(teacher)
    model.denoiser.requires_grad_(True)
    x0 = sample_items(
        model.denoiser,
        sampler=lambda denoise, x, sigmas, condition, noise: denoise(x, torch.ones(2), condition),
        sigmas=torch.tensor([1.0, 0.0]),
        condition=model.card.condition(torch.tensor([0, 1])),
        seed=0,
        items=torch.arange(2),
        shape=(1, 8, 8),
        device=torch.device("cpu"),
    )
    assert not x0.requires_grad


# --- recipes


def test_a_named_sampler_takes_the_denoisers_range_then_the_tuned_then_the_runs_own(teacher: Path) -> None:
    card = read_card(teacher)[1]
    tuned = {"euler-3": {"sigma_max": 20.0, "sigma_min": 0.15, "rho": 7.0}}
    assert torch.equal(settle(run_params(), card).sigmas, karras(3, 0.002, 80.0))
    assert torch.equal(settle(run_params(sigmas="tuned/teacher"), card, tuned).sigmas, karras(3, 0.15, 20.0))
    mixed = settle(run_params(sigmas="tuned/teacher", sigma_min=0.01), card, tuned)
    assert torch.equal(mixed.sigmas, karras(3, 0.01, 20.0))
    assert torch.equal(settle(run_params(sigma_max=5.0, rho=3.0), card).sigmas, karras(3, 0.002, 5.0, 3.0))


def test_a_student_is_sampled_as_it_was_distilled(student: Path) -> None:
    card = read_card(student)[1]
    for steps in (None, 3):
        recipe = settle(run_params(sampler="native", steps=steps), card)
        assert (recipe.sampler, recipe.steps, recipe.evaluations) == ("renoise", 3, 3)
        assert torch.equal(recipe.sigmas, karras(NATIVE.steps, 0.05, 8.0))


def test_a_drawn_plan_is_uniform_and_belongs_to_items() -> None:
    drawn = plan.drawn(20_000, range(10))
    counts = np.bincount(drawn, minlength=10)
    assert len(set(counts.tolist())) > 5  # by chance, not balanced
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    assert np.array_equal(plan.drawn(100, range(10)), drawn[:100])
    assert np.array_equal(plan.drawn(100, range(1, 11)), drawn[:100] + 1)


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance", "expected"),
    [("heun", 40, 1.0, 79), ("heun", 5, 1.0, 9), ("euler", 10, 1.5, 20), ("2m", 4, 1.0, 4), ("heun-churn", 8, 2.0, 30)],
)
def test_evaluations_count_both_guidance_branches(
    teacher: Path, sampler: str, steps: int, guidance: float, expected: int
) -> None:
    churn = ChurnParams() if sampler == "heun-churn" else None
    run = run_params(sampler=sampler, steps=steps, guidance=guidance, churn=churn)
    assert settle(run, read_card(teacher)[1]).evaluations == expected


def test_churn_takes_its_parameters(teacher: Path) -> None:
    churn = ChurnParams(churn=3.0, s_min=0.1, s_max=2.0, noise=1.1)
    solver = settle(run_params(sampler="heun-churn", churn=churn), read_card(teacher)[1]).solver()
    assert (solver.churn, solver.s_min, solver.s_max, solver.s_noise) == (3.0, 0.1, 2.0, 1.1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("which", "changes", "message"),
    [
        ("student", {"guidance": 1.5}, "guidance=1.5, but model teacher has no unconditional branch"),
        ("student", {"plan": "none"}, "was not trained without a class"),
        ("teacher", {"plan": "none", "guidance": 1.5}, "nothing to guide by"),
        ("student", {"sampler": "native", "steps": 4}, "steps=4, but model teacher was distilled for 3 steps"),
        ("student", {"sampler": "native", "steps": None, "sigma_max": 9.0}, "sigma_max is given"),
        ("teacher", {"sampler": "native", "steps": None}, "is a teacher without a schedule of its own"),
        ("teacher", {"sigma_min": 100.0}, "sigma_min=100.0 > 80.0"),
        ("teacher", {"sigmas": "tuned/teacher", "steps": 5}, "holds no euler-5 (it holds euler-3)"),
        ("teacher", {"sigmas": "tuned/teacher", "rho": 3.0}, "was tuned with rho=7.0"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    teacher: Path, student: Path, which: str, changes: dict[str, Any], message: str
) -> None:
    card = read_card(teacher if which == "teacher" else student)[1]
    run = run_params(**changes)
    tuned = {"euler-3": {"sigma_max": 20.0, "sigma_min": 0.15, "rho": 7.0}}
    with pytest.raises(InputError) as caught:
        settle(run, card, tuned if run.sigmas.startswith("tuned") else None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unconditional_model_takes_no_classes(tmp_path: Path) -> None:
    card = read_card(make_model(tmp_path / "plain", classes=()).path)[1]
    with pytest.raises(InputError, match="has no classes: use plan=none"):
        settle(run_params(), card)
    with pytest.raises(InputError, match="no unconditional branch"):
        settle(run_params(plan="none", guidance=2.0), card)
    assert settle(run_params(plan="none"), card).steps == 3


def test_no_class_is_the_null_class(teacher: Path) -> None:
    recipe = settle(run_params(plan="none"), read_card(teacher)[1])
    condition = recipe.condition(torch.tensor([-1, 2, -1]), torch.device("cpu"))
    assert condition.inputs()["class_labels"].tolist() == [3, 2, 3]


# --- handing out and writing blocks


def alone() -> World:
    return World(0, 1, torch.device("cpu"))


def run_all(compute: Any, blocks: list[Block], folder: Path, *, classes: int = 1, world: World | None = None) -> Any:
    """`run_blocks` with blocks of up to four items and a balanced plan."""
    images = sum(block.count for block in blocks)
    group = world or alone()
    return run_blocks(compute, blocks, np.arange(images) % classes, micro_batch=4, folder=folder, world=group, name="x")


def numbered(block: Block, items: Tensor, labels: Tensor) -> Tensor:
    """Images that show their item, class and seed: [micro_batch, 1, 2, 2]."""
    values = items + 100 * labels + 50 * block.seed
    return (values.float() / 127.5 - 1)[:, None, None, None].expand(-1, 1, 2, 2)


def test_blocks_are_padded_computed_once_and_read_in_order(tmp_path: Path) -> None:
    seen = []

    def compute(block: Block, items: Tensor, labels: Tensor) -> Tensor:
        seen.append((block.seed, items.tolist(), labels.tolist()))
        return numbered(block, items, labels)

    blocks = plan.blocks((0, 1), 5, 3)
    labels = np.arange(5) % 2
    progress = run_blocks(compute, blocks, labels, micro_batch=3, folder=tmp_path / "b", world=alone(), name="x")
    assert seen == [
        (seed, items, classes) for seed in (0, 1) for items, classes in (([0, 1, 2], [0, 1, 0]), ([3, 4, 5], [1, 0, 0]))
    ]
    assert progress.images == 10
    images = np.concatenate(list(read_blocks(tmp_path / "b", blocks, (2, 2, 1))))
    expected = [50 * seed + item + 100 * (item % 2) for seed in (0, 1) for item in range(5)]
    assert images[:, 0, 0, 0].tolist() == expected


def test_finished_blocks_are_never_touched_again(tmp_path: Path) -> None:
    blocks = plan.blocks((0,), 24, 4)
    folder = tmp_path / "b"

    def failing(block: Block, items: Tensor, labels: Tensor) -> Tensor:
        if block.first == 16:
            raise KeyError("an accident")
        return numbered(block, items, labels)

    with pytest.raises(KeyError):
        run_all(failing, blocks, folder)
    before = _identities(folder)
    assert len(before) == 4  # the writer finishes what it was given
    again = []

    def counting(block: Block, items: Tensor, labels: Tensor) -> Tensor:
        again.append(block.first)
        return numbered(block, items, labels)

    progress = run_all(counting, blocks, folder)
    assert again == [16, 20]
    assert progress.images == 8
    assert {name: _identities(folder)[name] for name in before} == before


def _identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.npy")}


@dataclass
class Group:
    """Ranks as threads of this process: what `World` offers, without processes."""

    size: int
    numbers: Any = field(init=False)
    barrier: threading.Barrier = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    box: dict[int, Any] = field(default_factory=dict)
    handed_out: int = 0

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)

    def next(self) -> int:
        with self.lock:
            self.handed_out += 1
            return self.handed_out - 1

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.box[rank] = value
        self.barrier.wait()
        values = [self.box[rank] for rank in range(self.size)]
        self.barrier.wait()
        return values


class Rank(World):
    def __init__(self, rank: int, group: Group) -> None:
        super().__init__(rank, group.size, torch.device("cpu"))
        self._group = group

    def broadcast(self, value: Any) -> Any:
        return self._group.exchange(self.rank, value)[0]

    def gather(self, value: Any) -> list[Any]:
        return self._group.exchange(self.rank, value)

    def barrier(self) -> None:
        self._group.barrier.wait()

    def counter(self, name: str) -> Any:
        return self._group


def in_threads(size: int, work: Callable[[Rank], Any]) -> list[Any]:
    """What `work` returns or raises, by rank."""
    group = Group(size)
    outcomes: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            outcomes[rank] = work(Rank(rank, group))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_a_slow_rank_does_not_hold_the_rest(tmp_path: Path) -> None:
    """The slow rank is in its first block until the other one has done all the rest."""
    blocks = plan.blocks((0,), 40, 4)
    others_done, done_by = threading.Event(), Counter[int]()

    def work(world: Rank) -> Any:
        def compute(block: Block, items: Tensor, classes: Tensor) -> Tensor:
            if world.rank == 1:
                assert others_done.wait(30), "the other rank did not take what the slow one left"
            done_by[world.rank] += 1
            if done_by[0] == len(blocks) - 1:
                others_done.set()
            return numbered(block, items, classes)

        return run_all(compute, blocks, tmp_path / "b", classes=2, world=world)

    outcomes = in_threads(2, work)
    assert [outcome.images for outcome in outcomes] == [40, 40]
    assert done_by[0] >= len(blocks) - 1
    assert sum(done_by.values()) == len(blocks)
    images = np.concatenate(list(read_blocks(tmp_path / "b", blocks, (2, 2, 1))))
    assert images[:, 0, 0, 0].tolist() == [item + 100 * (item % 2) for item in range(40)]


def test_a_stop_request_to_one_rank_stops_all_and_keeps_what_is_done(tmp_path: Path) -> None:
    blocks = plan.blocks((0,), 400, 4)

    def work(world: Rank) -> Any:
        def compute(block: Block, items: Tensor, classes: Tensor) -> Tensor:
            if world.rank == 1:
                world.stop.reason = "SIGTERM"
            return numbered(block, items, classes)

        return run_all(compute, blocks, tmp_path / "b", classes=2, world=world)

    outcomes = in_threads(2, work)
    if all(isinstance(outcome, Stopped) for outcome in outcomes):
        kept = len(_identities(tmp_path / "b"))
        assert 0 < kept < 100
        assert f"{4 * kept} of 400 images, all kept" in str(outcomes[0])
    else:  # rank 0 was done before rank 1 was asked
        assert [outcome.images for outcome in outcomes] == [400, 400]


def test_a_stop_before_the_first_block_leaves_everything_to_do(tmp_path: Path) -> None:
    world = alone()
    world.stop.reason = "its time limit"
    with pytest.raises(Stopped, match="stopped by its time limit with 0 of 8 images"):
        run_all(numbered, plan.blocks((0,), 8, 4), tmp_path, world=world)


def test_a_sample_that_is_not_finite_is_named(tmp_path: Path) -> None:
    def compute(block: Block, items: Tensor, labels: Tensor) -> Tensor:
        images = numbered(block, items, labels).clone()
        images[items == 6] = float("inf")
        return images

    with pytest.raises(SurroundingsError, match="item 6 of seed 3 is not finite"):
        run_all(compute, plan.blocks((3,), 12, 4), tmp_path / "b")
    assert not block_file(tmp_path / "b", Block(3, 4, 4)).exists()


def test_padding_that_is_not_finite_does_not_matter(tmp_path: Path) -> None:
    def compute(block: Block, items: Tensor, labels: Tensor) -> Tensor:
        images = numbered(block, items, labels).clone()
        images[items >= 6] = float("nan")
        return images

    run_all(compute, plan.blocks((0,), 6, 4), tmp_path / "b")
    assert len(_identities(tmp_path / "b")) == 2


def test_a_failing_writer_is_heard_before_the_work_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipestill.work.os.fsync", full)
    computed = []

    def compute(block: Block, items: Tensor, labels: Tensor) -> Tensor:
        computed.append(block)
        return numbered(block, items, labels)

    blocks = plan.blocks((0,), 4000, 4)
    with pytest.raises(SurroundingsError, match="No space left on device"):
        run_all(compute, blocks, tmp_path / "b")
    assert len(computed) < 10  # two may wait, one is being written, one computed
    assert list((tmp_path / "b").iterdir()) == []


def test_a_writer_writes_while_the_next_block_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered = threading.Event(), threading.Event()
    real = os.fsync

    def held(descriptor: int) -> None:
        entered.set()
        assert gate.wait(30)
        real(descriptor)

    monkeypatch.setattr("pipestill.work.os.fsync", held)
    first, second = Block(0, 0, 2), Block(0, 2, 2)
    with BlockWriter(tmp_path) as writer:
        writer.put(first, numbered(first, torch.arange(2), torch.zeros(2)))
        assert entered.wait(30)
        writer.put(second, numbered(second, torch.arange(2, 4), torch.zeros(2)))  # comes back at once
        assert not block_file(tmp_path, first).exists()
        gate.set()
    assert block_file(tmp_path, first).exists()
    assert block_file(tmp_path, second).exists()


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    block = Block(0, 0, 2)
    block_file(tmp_path, block).write_bytes(b"not an array")
    with pytest.raises(SurroundingsError, match=r"0000000000-0000000000\.npy cannot be read"):
        list(read_blocks(tmp_path, [block], (2, 2, 1)))
    np.save(block_file(tmp_path, block), np.zeros((3, 2, 2, 1), np.uint8))
    with pytest.raises(SurroundingsError, match="another shape"):
        list(read_blocks(tmp_path, [block], (2, 2, 1)))


# --- the artefact


@pytest.mark.parametrize("shard", [1, 3, 4, 100])
def test_images_are_read_as_they_were_written_whatever_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", shard * 12)
    images = np.arange(11 * 12, dtype=np.uint8).reshape(11, 2, 2, 3)
    labels = np.arange(11) % 2
    folder = tmp_path / "samples"
    folder.mkdir()
    parts = [images[:4], images[4:8], images[8:11]]
    write_samples(folder, parts, labels=labels, shape=(2, 2, 3), index={"seeds": [0], "images_per_seed": 11})
    manifest = artifacts.Manifest("samples", "sample", 1, {}, {}, artifacts.describe_files(folder))
    (folder / artifacts.MANIFEST).write_text(manifest.to_json())
    samples = open_samples(folder)
    assert samples.count == 11
    assert len(samples.index["shards"]) == -(-11 // min(shard, 11))
    assert (samples.labels == labels).all()
    for start, stop in ((0, 11), (0, 0), (2, 9), (10, 11), (3, 4), (11, 11)):
        assert (samples.images(start, stop) == images[start:stop]).all()
        assert samples.images(start, stop).shape == (stop - start, 2, 2, 3)
    with pytest.raises(IndexError):
        samples.images(5, 12)


@pytest.mark.parametrize(("plan", "columns"), [("balanced", 3), ("data", 10), ("drawn", 10), ("listed", 10)])
def test_the_overview_has_a_column_for_each_class_where_items_take_them_in_turn(
    tmp_path: Path, plan: str, columns: int
) -> None:
    labels, images = np.arange(20) % 3, np.zeros((20, 8, 8, 1), np.uint8)
    about = {"seeds": [0], "images_per_seed": 20, "plan": plan}
    for name in ("images", "features"):
        (tmp_path / name).mkdir()
    write_samples(tmp_path / "images", [images], labels=labels, shape=(8, 8, 1), index=about)
    rows = np.zeros((20, 2), np.float32)
    given = {"labels": labels, "shape": (8, 8, 1), "index": about}
    write_features(tmp_path / "features", [rows], {"classifier": 2}, range(20), images, **given)
    for name in ("images", "features"):
        shown = Image.open(tmp_path / name / "grid.png")
        assert shown.size == grid(images, columns=columns).shape[1::-1], name


def test_a_sampled_artefact_says_how_it_was_made(tmp_path: Path, teacher: Path) -> None:
    run = run_params(seeds=(4, 2), guidance=1.5)
    artifact = sample(run, name="run", model=teacher, output=tmp_path / "out", operation=CPU)
    assert artifact is not None
    samples = open_samples(tmp_path / "out")
    assert samples.labels.tolist() == [item % 3 for item in range(10)] * 2
    assert samples.seeds == (4, 2)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    payload = json.loads((teacher / "manifest.json").read_text())["payload"]
    assert index["model"] == {"name": "teacher", "payload": payload, "weights": "ema"}
    assert (index["evaluations"], index["guidance"], index["sampler"], index["steps"]) == (6, 1.5, "euler", 3)
    assert index["sigmas"] == karras(3, 0.002, 80.0).tolist()
    assert index["classes"] == list(CLASSES)
    manifest = artifact.manifest
    assert manifest.inputs["model"].payload == payload
    assert (manifest.parameters["seeds"], manifest.parameters["plan"]) == ([4, 2], "balanced")
    assert (manifest.summary["images"], manifest.summary["model_payload"]) == (20, payload)
    record = read_record("sample", manifest.key)
    assert record["finished"] is True
    assert record["images"] == 20
    assert record["seconds_per_image"] == pytest.approx(record["sampling_seconds"] / 20, rel=1e-3)
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.size == (3 * 34 + 2, 7 * 34 + 2)  # a column for each class, 20 images


def test_each_image_is_the_items_own(tmp_path: Path, teacher: Path) -> None:
    """Seed, number of seeds and count make no difference to an item, and the artefact holds what items.py gives."""
    long = sample(run_params(seeds=(4, 2)), name="a", model=teacher, output=tmp_path / "a", operation=CPU)
    short = sample(run_params(images=6, seeds=(2,)), name="b", model=teacher, output=tmp_path / "b", operation=CPU)
    assert long is not None
    assert short is not None
    images = open_samples(tmp_path / "a").images(0, 20)
    assert (open_samples(tmp_path / "b").images(0, 6) == images[10:16]).all()
    assert not (images[:10] == images[10:]).all()
    model = load_model(teacher)
    recipe = settle(run_params(), model.card)
    items = torch.arange(4, 8)
    x0 = recipe.sample(model.denoiser, seed=4, items=items, labels=items % 3, device=torch.device("cpu"))
    assert (to_uint8(x0).permute(0, 2, 3, 1).numpy() == images[4:8]).all()


def test_raw_weights_are_other_weights(tmp_path: Path, teacher: Path) -> None:
    for weights in ("ema", "raw"):
        sample(run_params(weights=weights), name="a", model=teacher, output=tmp_path / weights, operation=CPU)
    images = [open_samples(tmp_path / weights).images(0, 10) for weights in ("ema", "raw")]
    assert (images[0] != images[1]).any()


def test_bf16_changes_the_images_a_little(tmp_path: Path, teacher: Path) -> None:
    for precision in ("fp32", "bf16"):
        sample(run_params(precision=precision), name="a", model=teacher, output=tmp_path / precision, operation=CPU)
    exact, rough = (open_samples(tmp_path / name).images(0, 10).astype(int) for name in ("fp32", "bf16"))
    assert (exact != rough).any()
    assert np.abs(exact - rough).mean() < 4


def test_without_classes_labels_are_minus_one(tmp_path: Path, teacher: Path) -> None:
    sample(run_params(plan="none"), name="a", model=teacher, output=tmp_path / "a", operation=CPU)
    assert open_samples(tmp_path / "a").labels.tolist() == [-1] * 10
    plain = make_model(tmp_path / "plain", classes=()).path
    sample(run_params(plan="none"), name="b", model=plain, output=tmp_path / "b", operation=CPU)
    assert open_samples(tmp_path / "b").labels.tolist() == [-1] * 10


def test_classes_as_in_the_data(tmp_path: Path, digits: Path) -> None:
    from pipestill.data.store import open_dataset

    model = make_model(tmp_path / "ten", classes=tuple(open_dataset(digits).classes)).path
    run = run_params(plan="data", images=50, steps=1)
    artifact = sample(run, name="a", model=model, dataset=digits, output=tmp_path / "a", operation=CPU)
    data = open_dataset(digits)
    counts = np.bincount(data.labels[data.split["train"]])
    got = np.bincount(open_samples(tmp_path / "a").labels, minlength=10)
    assert (np.abs(got - 50 * counts / counts.sum()) < 1).all()
    assert artifact is not None
    assert artifact.manifest.inputs["dataset"].payload == data.artifact.manifest.payload
    with pytest.raises(InputError, match="give --dataset"):
        sample(run, name="a", model=model, output=tmp_path / "b", operation=CPU)
    other = make_model(tmp_path / "three").path
    with pytest.raises(
        InputError, match=r"model teacher has 3 classes, .* has 10: give the dataset that the model was"
    ):
        sample(run, name="a", model=other, dataset=digits, output=tmp_path / "b", operation=CPU)


def test_pictures_for_people(tmp_path: Path, teacher: Path) -> None:
    run = run_params(seeds=(4,))
    sample(run, name="a", model=teacher, output=tmp_path / "a", operation=CPU, png=tmp_path / "png")
    images = open_samples(tmp_path / "a").images(0, 10)
    files = sorted(path.relative_to(tmp_path / "png").as_posix() for path in (tmp_path / "png").rglob("*.png"))
    assert files == sorted(f"{CLASSES[item % 3]}/seed4-{item:06d}.png" for item in range(10))
    with Image.open(tmp_path / "png" / "two" / "seed4-000005.png") as picture:
        assert (np.asarray(picture) == images[5, :, :, 0]).all()


def test_an_artefact_that_is_there_is_left_alone(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(run_params(), name="a", model=teacher, output=tmp_path / "a", operation=CPU)
    before = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    again = sample(run_params(), name="a", model=teacher, output=tmp_path / "a", operation=CPU)
    assert again is not None
    assert "is there and verifies: nothing to do" in capsys.readouterr().err
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == before
    (tmp_path / "a" / "labels.npy").write_bytes(bytes((tmp_path / "a" / "labels.npy").stat().st_size))
    sample(run_params(), name="a", model=teacher, output=tmp_path / "a", operation=CPU)
    assert open_samples(tmp_path / "a").labels.tolist() == [item % 3 for item in range(10)]


def test_nothing_of_the_run_enters_the_artefact(tmp_path: Path, teacher: Path) -> None:
    for name in ("a", "b"):
        sample(run_params(), name=name, model=teacher, output=tmp_path / name, operation=CPU)
        for folder in (tmp_path / "runs").glob("sample/*"):
            (folder / "record.json").unlink()
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [".pipestill", "grid.png", "images-00000.npy", "index.json", "labels.npy", "manifest.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_tuned_range_must_be_of_this_model(tmp_path: Path, teacher: Path) -> None:
    run = run_params(sigmas="tuned/teacher")
    with pytest.raises(InputError, match="give --sigmas"):
        sample(run, name="a", model=teacher, output=tmp_path / "a", operation=CPU)
    with pytest.raises(InputError, match="is a model artefact, a tuned was expected"):
        sample(run, name="a", model=teacher, sigmas=teacher, output=tmp_path / "a", operation=CPU)
    other = artifacts.InputEntry("model", "another digest")
    tuned = tmp_path / ".tuned.partial"
    tuned.mkdir()
    (tuned / "tuned.json").write_text("{}")
    manifest = artifacts.Manifest("tuned", "tune", 1, {}, {"model": other}, artifacts.describe_files(tuned))
    artifacts.publish(tuned, tmp_path / "tuned", manifest)
    with pytest.raises(InputError, match="was tuned for another model"):
        sample(run, name="a", model=teacher, sigmas=tmp_path / "tuned", output=tmp_path / "a", operation=CPU)


def test_a_models_own_range_is_the_models(tmp_path: Path, teacher: Path, student: Path) -> None:
    with pytest.raises(InputError, match="is not --model"):
        sample(run_params(), name="a", model=teacher, sigmas=student, output=tmp_path / "a", operation=CPU)
    assert sample(run_params(), name="a", model=teacher, sigmas=teacher, output=tmp_path / "a", operation=CPU)


def test_the_world_of_one_hands_out_each_number_once() -> None:
    with distributed.world(device="cpu") as world:
        numbers = world.counter("a")
        assert [numbers.next() for _ in range(3)] == [0, 1, 2]
