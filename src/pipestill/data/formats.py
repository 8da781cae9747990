"""Which image formats are opened, and how many bits per channel a file really has.

Decoders reduce some files to 8 bits without a word, so the depth is read from the file's own header. Nothing here
decodes pixels.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

# Pillow knows more; those need other programs (EPS runs Ghostscript), hold several images, or have no clear signature
KNOWN = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "SGI", "TIFF", "WEBP")
Image.init()
FORMATS = tuple(name for name in KNOWN if name in Image.OPEN)  # older versions of Pillow lack AVIF
BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339  # TIFF tags


class Samples(NamedTuple):
    """What one channel of one pixel is."""

    bits: int = 8
    kind: str = "unsigned"  # or signed, floating-point

    @property
    def reason(self) -> str:
        """Why they do not fit into 8 bits; empty if they do."""
        if self.kind != "unsigned":
            return f"has {self.kind} values: convert it to 8 bits per channel"
        return f"has {self.bits} bits per channel: convert it to 8" if self.bits > 8 else ""


def samples_of(content: bytes) -> Samples:
    """What an encoded image holds, from its header; 8 bits if the header says nothing else or is damaged."""
    for starts, read in _READERS:
        if re.match(starts, content, re.DOTALL):
            try:
                return read(content)
            except Exception:  # a damaged header: decoding will say so
                return Samples()
    return Samples()


def _png(content: bytes) -> Samples:
    return Samples(content[24])  # IHDR comes first: length, type, width, height, depth


def _jpeg(content: bytes) -> Samples:
    at = 2
    while content[at] == 0xFF:
        marker = content[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            return Samples(content[at + 4])
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big") if marker != 0xFF else 1
    return Samples()


def _jpeg2000(content: bytes) -> Samples:
    stream = 0
    if content[:4] != b"\xff\x4f\xff\x51":
        stream = next(start for kind, start, _ in _boxes(content, 0, len(content)) if kind == b"jp2c")
    (count,) = struct.unpack_from(">H", content, stream + 40)
    depths = [content[stream + 42 + 3 * index] for index in range(count)]
    for _, start, _ in _inside(content, b"jp2h", b"pclr"):
        depths += content[start + 3 : start + 3 + content[start + 2]]
    signed = any(depth & 0x80 for depth in depths)
    return Samples(max(1 + (depth & 0x7F) for depth in depths), "signed" if signed else "unsigned")


def _avif(content: bytes) -> Samples:
    flags = [content[start + 2] for _, start, _ in _inside(content, b"meta", b"iprp", b"ipco", b"av1C")]
    return Samples(max(8 + 2 * bool(flag & 0x40) + 2 * (flag & 0x60 == 0x60) for flag in flags))


def _inside(content: bytes, *path: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The boxes at the end of a path of boxes."""
    found = [(b"", 0, len(content))]
    for name in path:
        found = [box for _, start, end in found for box in _boxes(content, start, end) if box[0] == name]
        if name == b"meta":
            found = [(kind, start + 4, end) for kind, start, end in found]  # version and flags
    yield from found


def _boxes(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of an ISO base media file (AVIF, JPEG 2000): type, and where the body begins and ends."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", content, start)
        body = start + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, body)
            body += 8
        stop = end if size == 0 else start + size
        if stop < body:
            return
        yield kind, body, min(stop, end)
        start = stop


def _tiff(content: bytes) -> Samples:
    directory = ImageFileDirectory_v2(content[: 16 if content[2] == 43 else 8])  # 43: BigTIFF
    file = io.BytesIO(content)
    file.seek(directory.next)
    directory.load(file)
    kinds = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
    found = next((kinds[kind] for kind in directory.get(SAMPLE_FORMAT, ()) if kind in kinds), "unsigned")
    return Samples(max(directory.get(BITS_PER_SAMPLE, (1,))), found)


def _netpbm(content: bytes) -> Samples:
    words = re.sub(rb"#[^\r\n]*", b" ", content[:4096]).split(maxsplit=4)
    return Samples(int(words[3]).bit_length())


def _sgi(content: bytes) -> Samples:
    return Samples(8 * content[3])


_READERS = (
    (rb"\x89PNG\r\n\x1a\n", _png),
    (rb"\xff\xd8\xff", _jpeg),
    (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n", _jpeg2000),
    (rb"....ftyp", _avif),
    (rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]", _tiff),
    (rb"P[2356]\s", _netpbm),
    (rb"P[fF]\s", lambda content: Samples(32, "floating-point")),
    (rb"\x01\xda", _sgi),
)
