"""From one image file's content to the pixels that are stored: which images are refused, and how the others are cut.

Pure functions of one image. The rule: what cannot become 8-bit grey or RGB without a choice that belongs to the
owner of the images (which background behind transparency, which frame, which ink profile, which 8 of 16 bits) is bad,
unless the parameters make that choice; everything else is converted, and the report counts it.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, UnidentifiedImageError

from pipestill.config import DataParams
from pipestill.data.formats import FORMATS, samples_of
from pipestill.data.resample import enlarged_middle
from pipestill.userfiles import OF_THE_SURROUNDINGS

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there is a limit here
warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a file, its own line says

FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
ORIENTATION = 0x0112  # EXIF tag
MOST_PIXELS = 1 << 27  # of one image: 512 MiB decoded, and at most 1.7 GiB while it is converted
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
TURNS = {  # what makes an image upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """This image cannot be used; the message says why, in words that do not depend on the machine."""


@dataclass(frozen=True)
class Form:
    """What every stored image is: [resolution, resolution, channels] uint8, made by a named transform and filter.

    `background` is the RGB colour behind transparent pixels; None refuses them.
    """

    resolution: int
    channels: Literal[1, 3]
    transform: Literal["none", "center-crop", "center-crop-adm"]
    filter: Literal["box", "bilinear", "bicubic", "lanczos"]
    background: tuple[int, int, int] | None = None

    @staticmethod
    def of(data: DataParams) -> Form:
        background = None if data.background == "refuse" else ImageColor.getrgb(data.background)[:3]
        return Form(data.resolution, 1 if data.color == "grey" else 3, data.transform, data.filter, background)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.resolution, self.resolution, self.channels


@dataclass
class Found:
    """What an image was before anything was done to it; empty where its header could not be read."""

    mode: str = ""
    width: int = 0
    height: int = 0
    orientation: int = 1
    transparent: bool = False  # has pixels that are not opaque


def prepare(content: bytes | NDArray[np.uint8], form: Form, found: Found) -> NDArray[np.uint8]:
    """The stored pixels uint8 [H, W, C] of an encoded file or of an array [H, W, C]; fills `found` on the way.

    Raises BadImage.
    """
    try:
        image = _opened(content, found)
        if image.format is not None:
            _refuse(image)
            found.orientation = _orientation(image)
            image.load()
            image = _opaque(image, form.background, found)
            image = image.transpose(TURNS[found.orientation]) if found.orientation in TURNS else image
    except (BadImage, MemoryError):
        raise
    except OSError as error:
        if error.errno in OF_THE_SURROUNDINGS:
            raise
        raise BadImage(_undecodable(error)) from error
    except Exception as error:  # a decoder may raise anything on a broken file
        raise BadImage(_undecodable(error)) from error
    return _shaped(image, form)


def _opened(content: bytes | NDArray[np.uint8], found: Found) -> Image.Image:
    """The image, not decoded yet. Raises BadImage for one whose channels have more than 8 bits or that is too large."""
    if not isinstance(content, bytes):
        image = Image.fromarray(content.squeeze(-1) if content.shape[-1] == 1 else content)
        found.mode, (found.width, found.height) = image.mode, image.size
        return image
    samples = samples_of(content)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception:
        if samples.reason:  # the better explanation
            raise BadImage(samples.reason) from None
        raise
    deep = samples.bits > 8 and ";" not in image.mode
    found.mode, (found.width, found.height) = f"{image.mode};{samples.bits}" if deep else image.mode, image.size
    if samples.reason:
        raise BadImage(samples.reason)
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and samples.bits < 8:  # decoding spreads the pixels to 8 bits, not it
        image.info["transparency"] = key * 255 // (2**samples.bits - 1)
    if image.width * image.height > MOST_PIXELS:
        raise BadImage(f"has {image.width}x{image.height} pixels, more than {MOST_PIXELS:,}: make it smaller")
    return image


def _undecodable(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is no image in a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {MOST_PIXELS:,} pixels: make it smaller"
    return f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def _orientation(image: Image.Image) -> int:
    """1 (upright) to 8; a value that EXIF does not know means nothing."""
    value = image.getexif().get(ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _refuse(image: Image.Image) -> None:
    """Raises BadImage for what has no single reading as 8-bit grey or RGB."""
    mode, frames = image.mode, getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's MPO is a JPEG with previews behind it
        raise BadImage(f"is animated or has several pages ({frames} frames)")
    if ";16" in mode or mode in ("I", "F"):
        raise BadImage(f"has more than 8 bits per channel (mode {mode}): convert it to 8")
    if mode not in PLAIN_MODES:
        raise BadImage(f"is neither grey nor RGB (mode {mode})")


def _opaque(image: Image.Image, background: tuple[int, int, int] | None, found: Found) -> Image.Image:
    """The decoded image without palette and transparency, on the background where it is not opaque.

    Raises BadImage if it is transparent and there is no background.
    """
    alpha = _alpha(image)
    image.info.pop("transparency", None)
    if alpha is not None and alpha.getextrema() != (255, 255):
        found.transparent = True
        if background is None:
            raise BadImage("has transparent pixels: set data.background to the colour behind them")
        canvas = Image.new("RGB", image.size, background)
        colour = image if image.mode in ("LA", "RGBA") else image.convert("RGB")
        canvas.paste(colour, mask=alpha)  # (colour·alpha + background·(255 - alpha)) / 255, rounded
        return canvas
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is (mode L), None if every one is: of a channel, a palette, or one transparent colour."""
    if image.mode in ("LA", "PA", "RGBA"):
        return image.getchannel("A")
    key = image.info.get("transparency")
    if key is None:
        return None
    if image.mode in ("1", "L"):
        return image.convert("L").point([0 if value == key else 255 for value in range(256)])
    return image.convert("RGBA").getchannel("A")


def _shaped(image: Image.Image, form: Form) -> NDArray[np.uint8]:
    """Colour, crop and size as the form says, uint8 [H, W, C]. Raises BadImage where `none` needs another size."""
    side = form.resolution
    mode = "L" if form.channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (side, side):
        if form.transform == "none":
            raise BadImage(f"is {image.width}x{image.height}, and data.transform=none takes {side}x{side} only")
        image = (_center_crop_adm if form.transform == "center-crop-adm" else _center_crop)(image, form)
    pixels: NDArray[np.uint8] = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(form.shape)


def _center_crop(image: Image.Image, form: Form) -> Image.Image:
    """The middle square, resized by the named filter (the usual preparation of EDM's data sets)."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image if image.size == (short, short) else image.crop((left, top, left + short, top + short))
    return square.resize((form.resolution, form.resolution), FILTERS[form.filter])


def _center_crop_adm(image: Image.Image, form: Form) -> Image.Image:
    """ADM's ImageNet preparation (Dhariwal and Nichol 2021): halved by box, then bicubic, then the middle square."""
    side = form.resolution
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if scale > 1:  # only the middle: a long image would take gigabytes
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        return Image.fromarray(enlarged_middle(pixels, height, width, side).squeeze())
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def difference_hash(pixels: NDArray[np.uint8]) -> int:
    """64 bits that say where a 9x8 grey thumbnail of [H, W, C] grows brighter to the right (Krawetz's dHash)."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")
