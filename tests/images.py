"""Small image folders for tests: good ones by class, and one bad file of each kind."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipestill.config import DataParams


def noise(count: int, side: int, channels: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random images uint8 [count, side, side, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def class_folders(root: Path, *, classes: int = 2, each: int = 6, side: int = 8, channels: int = 3) -> Path:
    """`root` with PNGs in sub-folders a, b, …"""
    images = noise(classes * each, side, channels)
    for index, image in enumerate(images):
        file = root / "abcdefghij"[index // each] / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image))
    return root


def data_params(path: Path, **changes: Any) -> DataParams:
    """Parameters for such a folder, images taken as they are."""
    return DataParams(**{"path": str(path), "resolution": 8, "color": "rgb", "transform": "none"} | changes)


def bad_files() -> dict[str, tuple[bytes, str]]:
    """For each kind of bad file its name, content, and words that the message must hold."""
    (rgb,) = noise(1, 8, 3)
    image = Image.fromarray(rgb)

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    (photo,) = noise(1, 64, 3)
    clear = image.convert("RGBA")
    clear.putpixel((0, 0), (1, 2, 3, 0))
    palette = image.convert("P")
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    frames = [Image.fromarray(frame) for frame in noise(3, 8, 3)]
    return {
        "truncated.jpg": (encoded(photo, "JPEG")[:-300], "truncated"),
        "deep.png": (saved(deep, "PNG"), "has 16 bits per channel"),
        "deep-rgb.png": (png_16bit_rgb(), "has 16 bits per channel"),
        "animated.gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated"),
        "animated.png": (saved(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated"),
        "cmyk.jpg": (saved(image.convert("CMYK"), "JPEG"), "neither grey nor RGB (mode CMYK)"),
        "clear.png": (saved(clear, "PNG"), "has transparent pixels: set data.background"),
        "clear-palette.png": (saved(palette, "PNG", transparency=palette.getpixel((0, 0))), "has transparent pixels"),
        "text.png": (b"this is no image", "is no image in a known format"),
        "empty.png": (b"", "is no image in a known format"),
    }


def png_16bit_rgb() -> bytes:
    """A 1x1 PNG with 16 bits a channel, which Pillow opens as plain RGB."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" + struct.pack(">HHH", 1000, 2000, 3000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
