"""Previews: shared over any number of ranks, items that fail, files that cannot be written, and no trace in weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from commands import can_mount, here, payload
from pipestill import artifacts
from pipestill.config import PreviewParams
from pipestill.distributed import World
from pipestill.errors import InputError
from pipestill.networks.model import load_model
from pipestill.previews import previews_of
from pipestill.sampling import background, preview
from pipestill.sampling.background import PictureWriter
from pipestill.sampling.preview import Previews
from pipestill.training.ema import Ema
from pipestill.training.teacher import TeacherTraining
from pipestill.training.tracking import Silent
from test_train import arguments
from tiny_models import CLASSES, make_model

ITEMS = 6  # two of each class
SIZES = (1, 2, 3, 5)
# Five ranks; the first of them make the same previews as groups of one, two and three too.
OVER_RANKS = """
import sys
from pathlib import Path
import torch.distributed as dist
from pipestill import distributed
from pipestill.distributed import World
from test_preview import SIZES, previews
model, folder, bad = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with distributed.world(device="cpu") as whole:
    for size in SIZES:
        group = dist.new_group(range(size), backend="gloo")
        if whole.rank < size:
            with previews(model, folder / str(size), World(whole.rank, size, whole.device, group), bad=bad) as made:
                made.make(20, 10)
"""


def previews(
    model: Path, folder: Path, world: World, *, bad: int = -1, updates: int = 40, **params: object
) -> Previews:
    """Previews of a model artefact's weights; item `bad` raises whenever it is among those sampled."""
    loaded = load_model(model)
    made = Previews(
        loaded.denoiser,
        loaded.card,
        Ema(loaded.denoiser.network),
        PreviewParams.model_validate({"each": 2, "patience": 60.0} | params),
        folder=folder,
        tracker=Silent(),
        world=world,
        updates=updates,
    )
    whole = made._pictures

    def pictures(items: list[int]) -> dict[int, preview.Picture]:
        if bad in items:
            raise RuntimeError(f"item {bad} is bad")
        return whole(items)

    made._pictures = pictures  # type: ignore[method-assign]
    return made


def over_ranks(model: Path, folder: Path, bad: int) -> str:
    """Runs the script; what its ranks printed."""
    script = folder / "script.py"
    script.write_text(OVER_RANKS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "5"),
            *map(str, (script, model, folder, bad)),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.asarray(Image.open(path)).astype(np.int64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "teacher").path


def names(size: int, without: tuple[int, ...] = ()) -> dict[str, int]:
    """Each item's file with so many ranks: contiguous shares, as even as they come."""
    found = {}
    for rank in range(size):
        first = rank * ITEMS // size
        for item in range(first, (rank + 1) * ITEMS // size):
            if item not in without:
                found[f"epoch_0010_rank_{rank}_sample_{item - first:02d}.png"] = item
    return found


@pytest.mark.timeout(300)
def test_any_number_of_ranks_makes_the_same_pictures_and_a_bad_item_takes_none_along(
    tmp_path: Path, model: Path
) -> None:
    said = over_ranks(model, tmp_path, bad=3)
    assert said.count("preview after update 20: item 3 failed (RuntimeError: item 3 is bad): the others go on") == 4
    alone = {item: pixels(tmp_path / "1/step-00000020" / name) for name, item in names(1, (3,)).items()}
    whole = pixels(tmp_path / "1/step-00000020.png")
    for size in SIZES:
        folder = tmp_path / str(size) / "step-00000020"
        assert {path.name for path in folder.iterdir()} == names(size, (3,)).keys()
        for name, item in names(size, (3,)).items():
            assert np.abs(pixels(folder / name) - alone[item]).max() <= 1  # the batch's size moves the last bit
        assert np.abs(pixels(folder.with_suffix(".png")) - whole).max() <= 1
    cells = [whole[2 + 34 * (item // 2) :, 2 + 34 * (item % 2) :][:32:4, :32:4] for item in range(ITEMS)]
    assert (cells[3] == 255).all(), "its place in the grid is empty"
    for item, picture in alone.items():
        assert np.abs(cells[item] - picture).max() <= 1


def test_more_ranks_than_items_leaves_ranks_without_work(tmp_path: Path, model: Path) -> None:
    world = World(0, 9, torch.device("cpu"))  # of six items the first of nine ranks has none
    assert previews(model, tmp_path, world)._sampled("preview") == {}
    shares = [previews(model, tmp_path, World(rank, 9, torch.device("cpu")))._own for rank in range(9)]
    assert [item for share in shares for item in share] == list(range(ITEMS))


def test_items_are_the_same_each_time_and_rows_are_the_classes_asked_for(tmp_path: Path, model: Path) -> None:
    alone = World(0, 1, torch.device("cpu"))
    made = previews(model, tmp_path, alone, classes=(CLASSES[2], 0), each=3)
    with made:
        made.make(5, 0)
        made.make(6, 1)
    first, second = (sorted((tmp_path / f"step-{step:08d}").iterdir()) for step in (5, 6))
    assert [path.name for path in first] == [f"epoch_0000_rank_0_sample_{item:02d}.png" for item in range(6)]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    again = previews(model, tmp_path / "other", alone, classes=(CLASSES[0],), each=3)
    assert torch.equal(made._labels, torch.tensor([2, 2, 2, 0, 0, 0]))
    assert torch.equal(again._labels, torch.tensor([0, 0, 0]))
    with pytest.raises(
        InputError, match=r"operation.preview.classes: there is no class 'nowt'; did you mean 'nought'\?"
    ):
        previews(model, tmp_path, alone, classes=("nowt",))


class Clock:
    """Stands for the module `time`: it goes on when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(preview, "time", clock)
    return clock


def walked(made: Previews, clock: Clock, updates: int, cost: float, epochs: Sequence[int] = ()) -> list[int]:
    """The updates of 1/8 s each after which a training makes previews that take so long, as its loop decides."""
    made_at: list[int] = []

    def make(step: int, epoch: int) -> None:
        clock.now += cost
        made_at.append(step)

    made._make = make  # type: ignore[method-assign]
    affordable, seen = made.unlimited, epochs or [0] * (updates + 1)
    for step in range(1, updates + 1):
        clock.now += 1 / 8
        if made.wanted(step, seen[step], seen[step - 1]) and affordable:
            made.make(step, seen[step])
        affordable = made.affordable()
        assert made.seconds <= made._params.share * (clock.now - made._began)
    return made_at


def test_updates_and_epochs(tmp_path: Path, model: Path, clock: Clock) -> None:
    alone = World(0, 1, torch.device("cpu"))
    by_updates = previews(model, tmp_path, alone, every=4, share=1)
    assert walked(by_updates, clock, 12, 0.05) == [4, 8, 12]
    by_epochs = previews(model, tmp_path, alone, every=2, unit="epochs", share=1)
    seen = [16 * step // 40 for step in range(21)]  # a batch of 16 of 40 images
    assert walked(by_epochs, clock, 20, 0.05, seen) == [5, 10, 15, 20]
    by_default = previews(model, tmp_path, alone, share=1, updates=90)
    assert walked(by_default, clock, 90, 0.01) == [*range(3, 91, 3)]


def test_previews_take_at_most_their_share_of_the_time(tmp_path: Path, model: Path, clock: Clock) -> None:
    """At 1/64 a preview of 0.25 s needs 16 s: 128 updates of 1/8 s for the first, 126 more with the one before."""
    alone, params = World(0, 1, torch.device("cpu")), {"updates": 1000, "share": 1 / 64}
    made = previews(model, tmp_path, alone, **params)
    made._estimated = 0.25
    assert walked(made, clock, 1000, 0.25) == [*range(129, 1000, 126)]
    wrong = previews(model, tmp_path, alone, **params)
    clock.now += 16  # estimated as 0 seconds, until the first has been measured
    assert walked(wrong, clock, 1000, 0.25)[:2] == [25, 127]
    slow = previews(model, tmp_path, alone, **params)
    slow._estimated = 0.5  # a first preview that was estimated too high delays no other
    assert walked(slow, clock, 1000, 0.25) == [257, 275, *range(381, 1000, 126)]
    seldom = previews(model, tmp_path, alone, every=400, **params)
    seldom._estimated = 0.25
    assert walked(seldom, clock, 1000, 0.25) == [400, 800]
    assert PreviewParams().share == 0.02


def test_a_training_makes_previews_by_default(
    tmp_path: Path, digits: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With nothing stated in `operation`, by a clock on which an update takes a minute and a picture no time."""
    update = TeacherTraining.update

    def a_minute(self: TeacherTraining, step: int) -> dict[str, torch.Tensor]:
        clock.now += 60
        return update(self, step)

    monkeypatch.setattr(TeacherTraining, "update", a_minute)
    changes = {"teachers.teacher.training": {"iterations": 2, "batch": 4, "validate_every": 0}}
    changes |= {"teachers.teacher.network": {"channels": [4], "layers": 1, "attention": [False], "norm_groups": 4}}
    here(*arguments(tmp_path, digits, "m", operation={}, **changes), runs=tmp_path / "runs")
    (folder,) = (tmp_path / "runs" / "previews").iterdir()
    assert f"previews: {folder}\n" in capsys.readouterr().err
    (grid,) = previews_of(artifacts.read(tmp_path / "m", "model").manifest.key, tmp_path / "runs")
    assert grid == folder / "step-00000002.png"  # the first that an update's time can pay for
    rows, columns = 10, 4  # a row a class
    assert pixels(grid).shape == (rows * (32 + 2) + 2, columns * (32 + 2) + 2)
    assert len(list(grid.with_suffix("").iterdir())) == rows * columns


def test_a_first_preview_is_estimated_by_one_evaluation(
    tmp_path: Path, model: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 steps of Heun are 35 evaluations; six items are one batch. The estimate itself counts as spent, 9 s."""
    lasting = iter((5.0, 2.0, 2.0))
    made = previews(model, tmp_path, World(0, 1, torch.device("cpu")))
    network = made._denoiser.network.train()
    whole, random = network.forward, torch.get_rng_state()

    def forward(*words: Any, **named: Any) -> Any:
        clock.now += next(lasting)
        assert not network.training
        return whole(*words, **named)

    monkeypatch.setattr(network, "forward", forward)
    clock.now += 3900.0
    made.estimate()
    assert not made.affordable()
    assert (made._estimated, made.seconds) == (70.0, 9.0)
    clock.now = 3949.0
    assert not made.affordable()
    clock.now = 3951.0
    assert made.affordable()
    assert network.training
    assert torch.equal(torch.get_rng_state(), random)


def test_everything_is_put_back_whatever_happens(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = World(0, 1, torch.device("cpu"))
    made = previews(model, tmp_path, alone)
    network = made._denoiser.network.train()
    for tensor in made._ema.tensors.values():
        tensor.mul_(0.5)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def fails(*words: object, **named: object) -> None:
        torch.rand(7)
        assert not network.training
        assert torch.equal(network.state_dict()["conv_in.weight"], 0.5 * weights["conv_in.weight"])
        raise MemoryError("no room")

    monkeypatch.setattr(preview, "sample_items", fails)
    random = torch.get_rng_state()
    with made:
        made.make(4, 0)
    assert capsys.readouterr().err.count("failed (MemoryError: no room): the others go on") == ITEMS
    assert not list(tmp_path.iterdir())
    assert network.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_items_that_fail_together_may_do_alone(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a batch has no room: what a failure held is let go before the items are tried one by one."""
    held: list[weakref.ref[torch.Tensor]] = []
    whole = preview.sample_items

    def narrow(*words: object, items: torch.Tensor, **named: object) -> torch.Tensor:
        if len(items) > 1:
            big = torch.zeros(1000)
            held.append(weakref.ref(big))
            raise MemoryError("no room")
        assert held[0]() is None
        return whole(*words, items=items, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(preview, "sample_items", narrow)
    with previews(model, tmp_path, World(0, 1, torch.device("cpu"))) as made:
        made.make(4, 0)
    assert len(held) == 1
    assert len(list(tmp_path.glob("step-00000004/*.png"))) == ITEMS
    assert "failed" not in capsys.readouterr().err


# --- files that cannot be written


def picture() -> preview.Picture:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_pictures_that_cannot_be_written_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    writer = PictureWriter()
    wanted = {tmp_path / "file" / "a.png": picture(), tmp_path / "b.png": picture(), tmp_path / "file/c.png": picture()}
    assert writer.put("preview after update 3", wanted)
    writer.close(60.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("preview after update 3: ")
    assert f"{tmp_path}/file" in line
    assert line.endswith("; nor could 1 others; the training goes on")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), picture())


def test_what_a_killed_training_left_half_written_is_removed(tmp_path: Path, model: Path) -> None:
    left, kept = tmp_path / "step-00000002" / ".a.png.77.partial", tmp_path / "step-00000002" / "a.png"
    left.parent.mkdir()
    left.write_bytes(b"half")
    kept.write_bytes(b"whole")
    with previews(model, tmp_path, World(1, 2, torch.device("cpu"))):
        pass
    assert left.exists(), "the leader alone removes it"
    with previews(model, tmp_path, World(0, 1, torch.device("cpu"))):
        pass
    assert not left.exists()
    assert kept.exists()


def test_a_file_system_that_is_too_slow_gets_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / f".a.png.{os.getpid()}.partial"
    os.mkfifo(pipe)
    writer = PictureWriter(patience=1000.0)
    taken = [writer.put(f"preview {number}", {tmp_path / "a.png": picture()}) for number in range(8)]
    assert taken.count(True) in (4, 5), "the thread may have begun with one"
    assert capsys.readouterr().err.splitlines() == [
        f"preview {number}: not written: the file system is too slow, 4 others wait"
        for number, accepted in enumerate(taken)
        if not accepted
    ]
    writer.close(0.0)  # waits for nobody
    with pipe.open("rb") as reader:
        reader.read()
    writer.close(60.0)


FULL = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_preview import picture
from pipestill.sampling.background import PictureWriter
writer = PictureWriter()
writer.put("preview after update 9", {{Path("full") / f"{{number}}.png": picture() for number in range(4)}})
writer.close(60.0)
"""


@pytest.mark.skipif(not can_mount(), reason="no mount namespace here")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    script = tmp_path / "script.py"
    script.write_text(FULL.format(path=[str(Path(__file__).parent), *sys.path]))
    mounted = f"mount -t tmpfs -o size=20k tmpfs full && {sys.executable} {script} && ls full"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (line,) = done.stderr.splitlines()
    assert "full/1.png could not be written: No space left on device; nor could 2 others; the training goes on" in line
    assert done.stdout.split() == ["0.png"]


def test_a_training_goes_on_while_a_file_system_hangs_and_gives_the_same_weights(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a pipe that nobody reads hangs as a file system does whose server is gone; an hour passes meanwhile."""
    runs = tmp_path / "runs"
    training = {"teachers.teacher.training": {"iterations": 6, "batch": 16, "validate_every": 0}}
    shown = {"every": 2, "share": 1, "rows": 2, "each": 2}
    here(
        *arguments(tmp_path, digits, "plain", operation={"preview": {"share": 0}}, **training), runs=tmp_path / "other"
    )
    assert "previews: " not in capsys.readouterr().err
    assert not (tmp_path / "other" / "previews").exists()
    here(*arguments(tmp_path, digits, "m", operation={"preview": shown}, **training), runs=runs)
    (work,) = (runs / "previews").iterdir()
    assert f"previews: {work}\n" in capsys.readouterr().err
    made = {path.relative_to(work) for path in work.rglob("*.png")}
    steps = ("step-00000002", "step-00000004", "step-00000006")
    assert {path.parts[0] for path in made if path.name.startswith("epoch_0000_rank_0")} == set(steps)
    manifest = artifacts.read(tmp_path / "m", "model").manifest
    assert previews_of(manifest.key, runs) == [work / f"{step}.png" for step in steps]
    assert not any(name.endswith(".png") for name in manifest.files)
    assert payload(tmp_path / "m") == payload(tmp_path / "plain"), "previews change no weight"
    (log,) = runs.glob("train/*/log.jsonl")
    spent = [json.loads(line)["preview_seconds"] for line in log.read_text().splitlines() if "preview_seconds" in line]
    assert len(spent) == 3
    assert 0 < spent[0] < spent[1] < spent[2]

    pipe = work / steps[0] / f".epoch_0000_rank_0_sample_01.png.{os.getpid()}.partial"
    for path in work.rglob("*.png"):
        path.unlink()
    os.mkfifo(pipe)
    capsys.readouterr()
    hung = pipe.with_name("epoch_0000_rank_0_sample_01.png")
    hangs, now, given = threading.Event(), [0.0], list[Path]()
    write, put = background.save_png, background.PictureWriter.put

    def written(picture: NDArray[np.uint8], path: Path) -> None:
        if path == hung:
            now[0] = 3600.0
            hangs.set()
        write(picture, path)

    def put_in_turn(self: background.PictureWriter, what: str, pictures: background.Pictures) -> bool:
        assert not given or hangs.wait(60)
        given.extend(path for path in pictures if path == hung)
        return put(self, what, pictures)

    monkeypatch.setattr(background, "save_png", written)
    monkeypatch.setattr(background.PictureWriter, "put", put_in_turn)
    monkeypatch.setattr(background, "time", SimpleNamespace(monotonic=lambda: now[0], thread_time=time.thread_time))
    here(*arguments(tmp_path, digits, "again", operation={"preview": shown}, **training), runs=runs)
    said = capsys.readouterr().err
    assert said.count(f"{hung} has been written for more than 30 s: does its file system hang?") == 1
    assert "preview after update 6: not written: the file system still hangs" in said
    assert payload(tmp_path / "again") == payload(tmp_path / "plain")
    assert {path.name for path in work.rglob("*.png")} == {"epoch_0000_rank_0_sample_00.png"}
    with pipe.open("rb") as reader:  # the server is back, and the thread that was left behind ends
        reader.read()
