"""What becomes of one image: which are refused, and the pixels of those that are not, against formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
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


def test_center_crop_takes_the_middle_square_and_box_averages() -> None:
    image = noise(1, 20, 3)[0][:16]  # 16 rows, 20 columns
    middle = image[:, 2:18].astype(np.float64)
    means = middle.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(ready(encoded(image), Form(8, 3, "center-crop", "box")) - means).max() <= 1  # Pillow rounds twice


def test_adm_crop_halves_by_box_until_below_twice_the_size() -> None:
    image = noise(1, 64, 3)[0][:, :48]  # 64 rows, 48 columns: 24x32, then 12x16, then bicubic to 8x11
    form = Form(8, 3, "center-crop-adm", "box")
    halved = Image.fromarray(image).resize((24, 32), Image.Resampling.BOX).resize((12, 16), Image.Resampling.BOX)
    small = np.asarray(halved.resize((8, 11), Image.Resampling.BICUBIC))
    assert (ready(encoded(image), form) == small[1:9]).all()


@pytest.mark.parametrize("name", ["box", "bilinear", "bicubic", "lanczos"])
def test_each_filter_is_the_one_that_it_names(name: str) -> None:
    (image,) = noise(1, 32, 3)
    wanted = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling[name.upper()]))
    assert (ready(image, Form(8, 3, "center-crop", name)) == wanted).all()  # type: ignore[arg-type]


def test_none_takes_the_exact_size_only() -> None:
    with pytest.raises(BadImage, match=r"is 9x9, and data\.transform=none takes 8x8 only"):
        ready(noise(1, 9, 3)[0])


def test_difference_hash_says_where_brightness_grows() -> None:
    ramp = np.tile(np.linspace(0, 255, 72).astype(np.uint8), (64, 1))[..., None]
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(ramp[:, ::-1]) == 0
    half = np.concatenate([ramp[:32], ramp[32:, ::-1]])
    assert difference_hash(half) == (2**32 - 1) << 32
