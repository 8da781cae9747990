"""What becomes of one image: which are refused, and the pixels of those that are not, against formulas in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from images import bad_files, encoded, noise
from pipestill.data.transforms import BadImage, Form, Found, difference_hash, prepare

AS_IS = Form(8, 3, "none", "box")


def ready(content: bytes | NDArray[np.uint8], form: Form = AS_IS) -> NDArray[np.uint8]:
    return prepare(content, form, Found())


@pytest.mark.parametrize("name", bad_files())
def test_each_kind_of_bad_file_is_refused_with_its_reason(name: str) -> None:
    content, words = bad_files()[name]
    with pytest.raises(BadImage) as caught:
        prepare(content, AS_IS, Found())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)  # reasons go into artefacts, which hold nothing of one process


def test_rgb_grey_and_bilevel_keep_their_pixels() -> None:
    (rgb,), (grey,) = noise(1, 8, 3), noise(1, 8, 1)
    assert (ready(encoded(rgb)) == rgb).all()
    assert (ready(encoded(grey)) == grey).all(axis=None)  # the same value in all three channels
    assert (ready(encoded(grey), Form(8, 1, "none", "box")) == grey).all()
    dots = Image.fromarray(grey[..., 0] > 127).convert("1")
    assert (ready(_png(dots), Form(8, 1, "none", "box"))[..., 0] == np.where(grey[..., 0] > 127, 255, 0)).all()
    assert (ready(rgb) == rgb).all()


def _png(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_colour_becomes_grey_by_luma() -> None:
    (rgb,) = noise(1, 8, 3)
    luma = rgb.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert np.abs(ready(encoded(rgb), Form(8, 1, "none", "box"))[..., 0] - luma).max() <= 1


def test_opaque_alpha_is_dropped() -> None:
    (rgb,) = noise(1, 8, 3)
    opaque = np.concatenate([rgb, np.full((8, 8, 1), 255, dtype=np.uint8)], axis=-1)
    found = Found()
    assert (prepare(_png(Image.fromarray(opaque)), AS_IS, found) == rgb).all()
    assert found.mode == "RGBA"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    (rgb,) = noise(1, 8, 3)
    turns = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: rgb[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(rgb),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = Found()
    assert (prepare(encoded(rgb, exif=exif), AS_IS, found) == turns[orientation]).all()
    assert found.orientation == orientation


# ---- resampling, written out from the definitions of the filters ----


def _sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


def _cubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


FILTERS: dict[str, tuple[float, Callable[[float], float]]] = {  # half the width of the support, and the filter
    "box": (0.5, lambda x: float(-0.5 < x <= 0.5)),
    "bilinear": (1.0, lambda x: max(0.0, 1 - abs(x))),
    "bicubic": (2.0, _cubic),
    "lanczos": (3.0, lambda x: _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0),
}


def resampled(pixels: NDArray[np.uint8], height: int, width: int, name: str) -> NDArray[np.uint8]:
    """[H, W, C] resized first along rows, then along columns, each time rounded to 8 bits as Pillow rounds.

    Weights are multiples of 2^-22. So the result is exact: no tolerance is needed.
    """
    across = np.moveaxis(_along_first(np.moveaxis(pixels, 1, 0), width, name), 0, 1)
    return _along_first(across, height, name)


def _along_first(pixels: NDArray[np.uint8], size: int, name: str) -> NDArray[np.uint8]:
    if size == len(pixels):
        return pixels
    support, weight = FILTERS[name]
    step = len(pixels) / size
    stretch = max(step, 1.0)  # a filter is widened to shrink an image, not narrowed to enlarge it
    rows = []
    for index in range(size):
        centre = (index + 0.5) * step
        first = max(int(centre - support * stretch + 0.5), 0)
        last = min(int(centre + support * stretch + 0.5), len(pixels))
        weights = np.array([weight((at - centre + 0.5) / stretch) for at in range(first, last)])
        fixed = np.trunc(weights / weights.sum() * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
        total = np.tensordot(fixed, pixels[first:last].astype(np.int64), axes=1)
        rows.append(np.clip((total + 2**21) >> 22, 0, 255))
    return np.stack(rows).astype(np.uint8)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(37, 52), (64, 24), (5, 9)])  # shrunk twice, and enlarged
def test_center_crop_is_the_middle_square_resized(name: str, height: int, width: int) -> None:
    image = noise(1, 64, 3)[0][:height, :width]
    short, top, left = min(height, width), max(height - width, 0) // 2, max(width - height, 0) // 2
    wanted = resampled(image[top : top + short, left : left + short], 16, 16, name)
    assert (ready(encoded(image), Form(16, 3, "center-crop", name)) == wanted).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(64, 48), (35, 67), (20, 17), (9, 5)])
def test_adm_crop_halves_by_box_then_resizes_then_crops(height: int, width: int) -> None:
    image = small = noise(1, 70, 3)[0][:height, :width]
    while min(small.shape[:2]) >= 2 * 8:
        small = resampled(small, small.shape[0] // 2, small.shape[1] // 2, "box")
    scale = 8 / min(small.shape[:2])
    small = resampled(small, round(small.shape[0] * scale), round(small.shape[1] * scale), "bicubic")
    top, left = (small.shape[0] - 8) // 2, (small.shape[1] - 8) // 2
    wanted = small[top : top + 8, left : left + 8]
    assert (ready(encoded(image), Form(8, 3, "center-crop-adm", "box")) == wanted).all()


def test_imagenet_is_prepared_as_edms_dataset_tool_does() -> None:
    """dataset_tool.py --transform=center-crop takes the middle square, then Lanczos; a box filter is far off."""
    body = yaml.safe_load((Path(__file__).parent.parent / "conf/data/imagenet64.yaml").read_text(encoding="utf-8"))
    data = body["data"]
    image = noise(1, 160, 3)[0][:, 5:155]
    image = resampled(image, 200, 190, "bicubic")  # so that neighbouring pixels are alike, as in photographs
    form = Form(data["resolution"], 3, data["transform"], data["filter"])
    wanted = resampled(image[5:195], 64, 64, "lanczos")
    assert (ready(encoded(image), form) == wanted).all()
    assert np.abs(resampled(image[5:195], 64, 64, "box").astype(int) - wanted).max() > 20


def test_none_takes_the_exact_size_only() -> None:
    with pytest.raises(BadImage, match=r"is 9x9, and data\.transform=none takes 8x8 only"):
        ready(noise(1, 9, 3)[0])


def test_difference_hash_says_where_brightness_grows() -> None:
    ramp = np.tile(np.linspace(0, 255, 72).astype(np.uint8), (64, 1))[..., None]
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(ramp[:, ::-1]) == 0
    half = np.concatenate([ramp[:32], ramp[32:, ::-1]])
    assert difference_hash(half) == (2**32 - 1) << 32
