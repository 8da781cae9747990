"""What becomes of one image: which are refused, and the pixels of those that are not, against formulas in NumPy."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from numpy.typing import NDArray
from PIL import Image

from images import bad_files, data_params, encoded, noise, png_16bit_rgb
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
    return _saved(image, "PNG")


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- formats and their depth ----

RGB = Image.fromarray(noise(1, 8, 3)[0])
LOSSLESS = {  # of each format that is opened, a file that keeps every pixel
    "avif": (lambda: _saved(RGB, "AVIF", quality=100, subsampling="4:4:4"), 6),  # colours are converted: a few levels
    "bmp": (lambda: _saved(RGB, "BMP"), 0),
    "jpeg": (lambda: _saved(RGB, "JPEG", quality=100, subsampling=0), 6),
    "jpeg2000": (lambda: _saved(RGB, "JPEG2000", irreversible=False), 0),
    "jpeg2000-codestream": (lambda: _saved(RGB, "JPEG2000", irreversible=False, no_jp2=True), 0),
    "png": (lambda: _saved(RGB, "PNG"), 0),
    "ppm": (lambda: _saved(RGB, "PPM"), 0),
    "ppm-text": (lambda: b"P3 # 8 8 65535\n8 8\n255\n" + " ".join(map(str, np.asarray(RGB).flat)).encode(), 0),
    "qoi": (lambda: _saved(RGB, "QOI"), 0),
    "sgi": (lambda: _saved(RGB, "SGI"), 0),
    "tiff": (lambda: _saved(RGB, "TIFF"), 0),
    "tiff-big": (lambda: _tiff(np.asarray(RGB), bigtiff=True), 0),
    "tiff-big-endian": (lambda: _tiff(np.asarray(RGB), byteorder=">"), 0),
    "webp": (lambda: _saved(RGB, "WEBP", lossless=True), 0),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_each_known_format_is_taken(name: str) -> None:
    make, most = LOSSLESS[name]
    assert np.abs(ready(make()).astype(int) - np.asarray(RGB)).max() <= most


def _tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    colour = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(buffer, pixels, photometric=colour, **options)
    return buffer.getvalue()


def _patched(content: bytes, before: bytes, after: bytes) -> bytes:
    assert content.count(before) == 1
    return content.replace(before, after)


GREY16 = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
RGB16 = np.stack([GREY16] * 3, axis=-1)
BE16 = RGB16.astype(">u2").tobytes()
# nothing here can write an RGB JPEG 2000 of 12 bits: what a header of 8 bits becomes when it says another depth
SIZ = bytes.fromhex("0003 070101 070101 070101")
DEEP: dict[str, tuple[Callable[[], bytes], str]] = {
    "png": (lambda: _png(Image.fromarray(GREY16)), "has 16 bits per channel"),
    "png-rgb": (png_16bit_rgb, "has 16 bits per channel"),
    "tiff": (lambda: _tiff(GREY16), "has 16 bits per channel"),
    "tiff-rgb": (lambda: _tiff(RGB16), "has 16 bits per channel"),
    "tiff-rgb-big": (lambda: _tiff(RGB16, bigtiff=True), "has 16 bits per channel"),
    "tiff-rgb-big-endian": (lambda: _tiff(RGB16, byteorder=">"), "has 16 bits per channel"),
    "tiff-rgba": (
        lambda: _tiff(np.concatenate([RGB16, RGB16[..., :1]], axis=-1), extrasamples=["unassalpha"]),
        "has 16 bits per channel",
    ),
    "tiff-32": (lambda: _tiff(RGB16.astype(np.uint32)), "has 32 bits per channel"),
    "tiff-signed": (lambda: _tiff(GREY16.astype(np.int8)), "has signed values"),
    "tiff-float": (lambda: _tiff(GREY16.astype(np.float32)), "has floating-point values"),
    "tiff-float-rgb": (lambda: _tiff(RGB16.astype(np.float32)), "has floating-point values"),
    "tiff-half": (lambda: _tiff(RGB16.astype(np.float16)), "has floating-point values"),
    "pgm": (lambda: b"P5 8 8 65535\n" + GREY16.astype(">u2").tobytes(), "has 16 bits per channel"),
    "ppm": (lambda: b"P6\n# a comment 255\n8 8\n65535\n" + BE16, "has 16 bits per channel"),
    "ppm-10": (lambda: b"P6 8 8 1023\n" + BE16, "has 10 bits per channel"),
    "ppm-text": (lambda: b"P3 8 8 4095\n" + b"4095 " * 192, "has 12 bits per channel"),
    "pfm": (lambda: b"Pf\n8 8\n-1.0\n" + GREY16.astype("<f4").tobytes(), "has floating-point values"),
    "pfm-rgb": (lambda: b"PF\n8 8\n-1.0\n" + RGB16.astype("<f4").tobytes(), "has floating-point values"),
    "sgi": (lambda: _saved(RGB, "SGI", bpc=2), "has 16 bits per channel"),
    "jpeg2000": (lambda: _saved(Image.fromarray(GREY16), "JPEG2000"), "has 16 bits per channel"),
    "jpeg2000-rgb": (
        lambda: _patched(_saved(RGB, "JPEG2000"), SIZ, SIZ.replace(b"\x07", b"\x0b")),
        "has 12 bits per channel",
    ),
    "jpeg2000-signed": (
        lambda: _patched(_saved(RGB, "JPEG2000", no_jp2=True), SIZ, SIZ.replace(b"\x07", b"\x87")),
        "has signed values",
    ),
    "jpeg-12": (
        lambda: _patched(_saved(RGB, "JPEG"), b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        "has 12 bits per channel",
    ),
    "avif-10": (lambda: _avif(0x40), "has 10 bits per channel"),
    "avif-12": (lambda: _avif(0x60), "has 12 bits per channel"),
}


def _avif(flags: int) -> bytes:
    """An AVIF whose configuration says more bits."""
    content = _saved(RGB, "AVIF")
    at = content.index(b"av1C") + 6
    return content[:at] + bytes([content[at] | flags]) + content[at + 1 :]


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused_in_each_format(name: str) -> None:
    make, says = DEEP[name]
    with pytest.raises(BadImage, match=says):
        ready(make())


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "DDS", "PDF"])
def test_other_formats_are_not_opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS would run Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was run"))
    with pytest.raises(BadImage, match=r"is no image in a known format \(AVIF, BMP, GIF, .*\)"):
        ready(_saved(RGB, kind))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_headers_that_are_cut_off_are_bad(cut: int) -> None:
    for make, _ in [*LOSSLESS.values(), *DEEP.values()]:
        with pytest.raises(BadImage):
            ready(make()[:cut])


# ---- size ----


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG of 200 bytes that says it is 20,000 pixels wide and high, and one that Pillow itself refuses."""
    content = _png(Image.new("RGB", (8, 8)))
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    for side in (12_000, 20_000):
        header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        bomb = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
        with pytest.raises(BadImage, match=r"more than 134,217,728( pixels)?: make it smaller"):
            ready(bomb)


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_image_is_cropped_before_it_is_enlarged(turned: bool) -> None:
    """It would take 5.4 GB otherwise; the result is the one that enlarging first gives."""
    script = """
import resource, sys
from pathlib import Path
from pipestill.data.transforms import Form, Found, prepare
content = Path(sys.argv[1]).read_bytes()
prepare(content, Form(8, 3, "center-crop-adm", "box"), Found())  # imports everything
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20),) * 2)
for transform in ("center-crop-adm", "center-crop"):
    assert prepare(content, Form(256, 3, transform, "lanczos"), Found()).shape == (256, 256, 3)
"""
    pixels = noise(20_000, 1, 3)[:, 0]  # 20,000 rows of one pixel
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(encoded(pixels if turned else pixels.swapaxes(0, 1)))
        file.flush()
        subprocess.run([sys.executable, "-c", script, file.name], check=True)


@pytest.mark.parametrize(("height", "width", "side"), [(1, 90, 16), (70, 3, 20), (7, 23, 31), (5, 5, 9), (40, 11, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_middle_of_an_enlarged_image(height: int, width: int, side: int, channels: int) -> None:
    (image,) = noise(1, 90, channels)[:, :height, :width]
    scale = side / min(height, width)
    whole = resampled(image, round(height * scale), round(width * scale), "bicubic")
    top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
    form = Form(side, 1 if channels == 1 else 3, "center-crop-adm", "box")
    assert (ready(encoded(image), form) == whole[top : top + side, left : left + side]).all()


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


# ---- palettes and transparency ----


def _raw_png(bits: int, kind: int, row: bytes, *, transparent: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG of 8x8 pixels with equal rows: kind 0 is grey, 2 RGB, 3 a palette."""
    content = b"\x89PNG\r\n\x1a\n"
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0)), (b"PLTE", palette), (b"tRNS", transparent)]
    for name, body in [*chunks, (b"IDAT", zlib.compress((b"\0" + row) * 8)), (b"IEND", b"")]:
        if body or name == b"IEND":
            content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return content


COLOURS = np.array([[255, 0, 0], [10, 200, 30], [0, 0, 255], [250, 250, 250]], dtype=np.uint8)
INDICES = np.tile([0, 1, 2, 3, 3, 2, 1, 0], (8, 1)).astype(np.uint8)
SOFT = np.tile([0, 1, 2, 100, 127, 128, 254, 255], (8, 1)).astype(np.uint8)  # alpha
GREYS = np.tile([0, 85, 170, 255, 255, 170, 85, 0], (8, 1)).astype(np.uint8)


def _layers(colour: NDArray[np.uint8], alpha: NDArray[np.uint8], mode: str) -> Image.Image:
    bands = [*np.moveaxis(colour, -1, 0), alpha]
    return Image.merge(mode, [Image.fromarray(np.ascontiguousarray(band)) for band in bands])


def _transparent() -> dict[str, tuple[bytes, NDArray[np.uint8], NDArray[np.uint8]]]:
    """For each form of transparency a file, the colours [8, 8, 3] in it, and how opaque they are [8, 8]."""
    (rgb,), by_palette, row = noise(1, 8, 3), COLOURS[INDICES], INDICES[0].tobytes()
    grey = np.repeat(GREYS[..., None], 3, axis=-1)
    alphas = np.array([0, 90, 200, 255], dtype=np.uint8)
    palette = Image.fromarray(INDICES).convert("PA")
    palette.putpalette(COLOURS.tobytes())
    palette.putalpha(Image.fromarray(SOFT))
    half = np.repeat(np.where(GREYS > 127, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)
    key = bytes([0, 10, 0, 200, 0, 30])
    return {
        "rgba": (_png(_layers(rgb, SOFT, "RGBA")), rgb, SOFT),
        "rgba-webp": (_saved(_layers(rgb, SOFT, "RGBA"), "WEBP", lossless=True, exact=True), rgb, SOFT),
        "rgba-tiff": (_saved(_layers(rgb, SOFT, "RGBA"), "TIFF"), rgb, SOFT),
        "grey-alpha": (_png(_layers(GREYS[..., None], SOFT, "LA")), grey, SOFT),
        "palette-alpha": (_saved(palette, "TIFF"), by_palette, SOFT),
        "palette-alphas": (
            _raw_png(8, 3, row, palette=COLOURS.tobytes(), transparent=alphas.tobytes()),
            by_palette,
            alphas[INDICES],
        ),
        "palette-2-bits": (
            _raw_png(2, 3, bytes([0b00011011, 0b11100100]), palette=COLOURS.tobytes(), transparent=alphas.tobytes()),
            by_palette,
            alphas[INDICES],
        ),
        "gif": (
            _saved(_with_palette(), "GIF", transparency=2),
            by_palette,
            np.where(INDICES == 2, 0, 255).astype(np.uint8),
        ),
        "rgb-key": (
            _raw_png(8, 2, by_palette[0].tobytes(), transparent=key),
            by_palette,
            np.where(INDICES == 1, 0, 255).astype(np.uint8),
        ),
        "grey-key": (
            _raw_png(8, 0, GREYS[0].tobytes(), transparent=b"\0\xaa"),
            grey,
            np.where(GREYS == 170, 0, 255).astype(np.uint8),
        ),
        "grey-key-2-bits": (
            _raw_png(2, 0, bytes([0b00011011, 0b11100100]), transparent=b"\0\2"),
            grey,
            np.where(GREYS == 170, 0, 255).astype(np.uint8),
        ),
        "grey-key-4-bits": (
            _raw_png(4, 0, bytes([0x05, 0xAF, 0xFA, 0x50]), transparent=b"\0\x0a"),
            grey,
            np.where(GREYS == 170, 0, 255).astype(np.uint8),
        ),
        "bilevel-key": (
            _raw_png(1, 0, bytes([0b00111100]), transparent=b"\0\1"),
            half,
            255 - half[..., 0],
        ),
    }


def _with_palette() -> Image.Image:
    image = Image.fromarray(INDICES)
    image.putpalette(COLOURS.tobytes())
    return image


@pytest.mark.parametrize("form", _transparent())
@pytest.mark.parametrize(
    ("background", "colour"),
    [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#0a64FF", (10, 100, 255))],
)
def test_transparent_pixels_show_the_background(form: str, background: str, colour: tuple[int, int, int]) -> None:
    content, colours, alpha = _transparent()[form]
    opacity = alpha[..., None].astype(np.int64)
    wanted = (2 * (colours * opacity + np.array(colour) * (255 - opacity)) + 255) // 510  # rounded to the nearest
    params = data_params(Path("photos"), background=background)
    found = Found()
    assert (prepare(content, Form.of(params), found) == wanted).all()
    assert found.transparent
    luma = ready(content, Form.of(params.model_copy(update={"color": "grey"})))
    assert np.abs(luma[..., 0] - wanted @ [0.299, 0.587, 0.114]).max() <= 0.502  # Pillow's weights are in 1/65536
    with pytest.raises(BadImage, match=r"has transparent pixels: set data\.background"):
        ready(content)


def test_depth_is_looked_at_before_transparency() -> None:
    deep = _raw_png(16, 6, bytes(64))  # RGBA of 16 bits
    with pytest.raises(BadImage, match="has 16 bits per channel"):
        ready(deep, Form(8, 3, "none", "box", (255, 255, 255)))


@pytest.mark.parametrize("background", [None, (1, 2, 3)])
def test_opaque_palettes_and_keys_that_no_pixel_has_are_plain_colours(background: tuple[int, int, int] | None) -> None:
    form = Form(8, 3, "none", "box", background)
    for content in (
        _png(_with_palette()),
        _saved(_with_palette(), "GIF"),
        _saved(_with_palette(), "BMP"),
        _saved(_with_palette(), "TIFF"),
        _raw_png(8, 3, INDICES[0].tobytes(), palette=COLOURS.tobytes(), transparent=b"\xff\xff"),
        _raw_png(8, 2, COLOURS[INDICES][0].tobytes(), transparent=bytes([0, 1, 0, 2, 0, 3])),
    ):
        found = Found()
        assert (prepare(content, form, found) == COLOURS[INDICES]).all()
        assert not found.transparent
    grey = _raw_png(2, 0, bytes([0b00011011, 0b11100100]), transparent=b"\0\x55")
    assert (ready(grey, form) == GREYS[..., None]).all()


def test_a_transparent_image_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = _layers(noise(1, 8, 3)[0], np.full((8, 8), 255, dtype=np.uint8), "RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    content = _saved(image, "PNG", exif=exif)
    wanted = np.asarray(image)[..., :3].copy()
    wanted[0, 0] = 255
    assert (ready(content, Form(8, 3, "none", "box", (255, 255, 255))) == np.rot90(wanted, -1)).all()


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
