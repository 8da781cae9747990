"""Benchmarks whose full run needs a GPU or a quarter of an hour: each part of them, on the smallest network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipestill.networks.adm import Adm
from s3_server import S3Server
from workflow_project import Project

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu
import rollouts
import share

TINY = Adm(8, 3, 4, 32, (1, 2), 128, 1, (False, True))


@pytest.fixture(scope="module")
def bench() -> gpu.Bench:
    return gpu.Bench(TINY, torch.device("cpu"), repeats=1)


def check(figures: dict[str, Any]) -> None:
    assert figures.keys() == {"first", "seconds", "per_second", "peak_gib", "share"}
    assert all(value > 0 for value in figures.values())


def test_each_rollout_is_measured_beside_the_straightforward_form(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "SMALL", TINY)
    monkeypatch.setattr(sys, "argv", f"gpu.py --small --only distill --batch 2 --repeats 1 --output {output}".split())
    gpu.main()
    rows = json.loads(output.read_text(encoding="utf-8"))["DMD2 iteration, batch 2, student states per second"]
    assert list(rows) == ["straightforward", "fresh", "every_step", "pool"]
    plain = rows["straightforward"]["per_second"]
    for figures in rows.values():
        assert figures.pop("ratio") == pytest.approx(figures["per_second"] / plain, abs=0.01)
        check(figures)


def test_nothing_is_begun_after_the_time_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "SMALL", TINY)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--small", "--minutes", "0", "--batch", "2", "--repeats", "1", "--compile"]
    )
    gpu.main()
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of time")]
    assert len(skipped) == 7 + 2 * 3 + 1


def test_sampling_and_features_are_measured(bench: gpu.Bench) -> None:
    check(bench.sampling(batch=2, sampler="heun", steps=2, precision="fp32", compiled=False))
    figures = bench.features(images=40)
    assert figures["images"] == 40
    assert figures["per_second"] > 0


def test_rollouts_are_summed_up_by_seed() -> None:
    rows = [
        {
            "rollout": "pool",
            "seed": seed,
            "updates": updates,
            "seconds": 2.0 * updates,
            "student_forwards": 100 * updates,
        }
        | {"distance": distance}
        for seed, updates, distance in ((0, 0, 50.0), (0, 4, 10.0), (0, 8, 12.0), (1, 0, 50.0), (1, 10, 20.0))
    ]
    assert rollouts.table(rows) == {
        "pool": {
            "last": [12.0, 20.0],
            "mean_last": 16.0,
            "mean_best": 15.0,
            "updates": 9,
            "seconds_an_update": 2.0,
            "forwards_an_update": 100.0,
        }
    }


def test_sharing_through_an_s3_store_is_measured_and_leaves_a_colleague_nothing_to_do(
    tiny: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with S3Server() as server:
        seconds = share.share(tiny, tmp_path, server=server)
    assert all(value >= 0 for value in seconds.values())
    transfer = seconds["dvc push"] + seconds["dvc pull"]
    assert share.besides_transfer(seconds) == pytest.approx(sum(seconds.values()) - transfer, abs=0.01)
    share.show({"an S3 store": seconds})
    assert f"| pipestill sync | {seconds['pipestill sync']:.1f} |" in capsys.readouterr().out
