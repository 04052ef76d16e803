"""Image files that a stranger may send: 300 damaged ones, bombs, and files that start programs."""

from __future__ import annotations

import functools
import random
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COUNT = 300


def picture(width: int = 48, height: int = 40) -> Image.Image:
    corners = np.random.default_rng(0).integers(0, 256, (3, 3, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.copy().save(file, kind, **options)  # Pillow keeps a format's settings in what it has saved
    return file.getvalue()


def animated(kind: str, **options: Any) -> bytes:
    frames = [picture().rotate(angle) for angle in (90, 180)]
    return saved(picture(), kind, save_all=True, append_images=frames, **options)


@functools.cache
def whole_files() -> dict[str, list[bytes]]:
    """Several good files of each format: with and without transparency, metadata, compression, frames."""
    image, exif = picture(), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text of some length"
    clear = image.copy()
    clear.putalpha(image.getchannel("G"))
    more = {"exif": exif, "icc_profile": bytes(200)}
    radiance = b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 40 +X 48\n" + clear.tobytes()
    return {
        "PNG": [saved(clear, "PNG", **more), saved(image.convert("P"), "PNG", transparency=3), saved(image, "PNG")],
        "JPEG": [saved(image, "JPEG", **more), saved(image, "JPEG", progressive=True), animated("MPO")],
        "BMP": [saved(image, "BMP"), saved(image.convert("P"), "BMP"), saved(clear, "BMP")],
        "WEBP": [saved(clear, "WEBP", **more), saved(image, "WEBP", lossless=True), animated("WEBP")],
        "GIF": [saved(image, "GIF"), animated("GIF"), saved(image.convert("P"), "GIF", transparency=3)],
        "TIFF": [
            saved(clear, "TIFF", **more),
            animated("TIFF", compression="tiff_lzw"),
            saved(image, "TIFF", compression="jpeg"),
            saved(image.convert("F"), "TIFF"),
        ],
        "Radiance": [radiance],
    }


def bytes_flipped(whole: bytes, rng: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(rng.choice((1, 2, 8, 64))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def head_changed(whole: bytes, rng: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 4))):
        content[rng.randrange(min(80, len(content)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(content)


def sides_made_huge(whole: bytes, rng: random.Random) -> bytes:
    """Each number that may be a side of the image, in any of the ways that the formats write one."""
    side = rng.choice((0, 5000, 13000, 16383, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**32 - 1))
    for old in (40, 48):
        for form in rng.sample(("<H", ">H", "<L", ">L"), rng.randrange(1, 5)):
            new = struct.pack(form, side % 2 ** (8 * struct.calcsize(form)))
            whole = whole.replace(struct.pack(form, old), new, rng.choice((1, 2, -1)))
    return whole.replace(b"-Y 40 +X 48", f"-Y {side} +X {side}".encode())


def cut(whole: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
    return rng.choice((whole[:last], whole[:last], whole[first:], whole[:first] + whole[last:]))


def garbage_appended(whole: bytes, rng: random.Random) -> bytes:
    return rng.choice((whole, whole[: rng.randrange(len(whole))])) + rng.randbytes(rng.choice((1, 100, 10**5)))


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack(">L", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """With the right checksums: it comes past the first check."""
    whole = [struct.pack(">L", len(data)) + name + data for name, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(one + struct.pack(">L", zlib.crc32(one[4:])) for one in whole)


def chunks_changed(whole: bytes, rng: random.Random) -> bytes:
    """The chunks of a PNG in another order or with other content, whatever the format was."""
    chunks = png_chunks(rng.choice(whole_files()["PNG"]))
    index = rng.randrange(len(chunks))
    name, data = chunks[index]
    changed = (bytes_flipped(data, rng) if data else rng.randbytes(9), data[: len(data) // 2], b"", data * 3, bytes(9))
    chunks[index] = name, rng.choice(changed)
    if rng.random() < 0.3:
        rng.shuffle(chunks)
    return png_of(chunks)


WAYS = (bytes_flipped, head_changed, sides_made_huge, cut, garbage_appended, chunks_changed)


def write_damaged(folder: Path) -> None:
    """Every format in every way, the suffix by chance."""
    for number in range(COUNT):
        rng, kinds = random.Random(number), list(whole_files())
        kind, way = kinds[number % len(kinds)], WAYS[number // len(kinds) % len(WAYS)]
        suffix = rng.choice((".png", ".jpg", ".bmp", ".webp", ".gif", ".tif", ".hdr", ".tga", ".ico"))
        content = way(rng.choice(whole_files()[kind]), rng)
        (folder / f"{kind} {way.__name__} {number:03}{suffix}").write_bytes(content)


# Bombs ------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, colour: int, *more: tuple[bytes, bytes], bits: int = 8) -> bytes:
    """One colour, a thousandth of the size of its pixels."""
    packer, million = zlib.compressobj(9), bytes(2**20)
    first, again = (packer.compress(million) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    channels = {0: 1, 2: 3, 6: 4}[colour]
    bytes_of_it = height * (1 + width * channels * bits // 8)
    header = struct.pack(">LLBBBBB", width, height, bits, colour, 0, 0, 0)
    return png_of([(b"IHDR", header), *more, (b"IDAT", first + again * (bytes_of_it >> 20)), (b"IEND", b"")])


def jpeg_that_claims(side: int, **options: Any) -> bytes:
    content = saved(picture(), "JPEG", **options)
    return content.replace(struct.pack(">HH", 40, 48), struct.pack(">HH", side, side), 1)


def jpeg_of_many_scans(side: int = 4000, scans: int = 5000) -> bytes:
    content = saved(Image.new("RGB", (side, side), "red"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * scans + b"\xff\xd9"


def webp_that_claims(side: int) -> bytes:
    """The canvas of an animation: each frame is only a part of it."""
    content = animated("WEBP")
    place = content.index(b"VP8X") + 12
    return content[:place] + (side - 1).to_bytes(3, "little") * 2 + content[place + 6 :]


def tiff(data: bytes = bytes(256), **changes: tuple[int, int, int]) -> bytes:
    """A grey image of 16x16 in one strip; each tag t258=(type, count, value) replaces or adds one, None removes it."""
    tags = {256: (3, 1, 16), 257: (3, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 2**20)}
    tags |= {277: (3, 1, 1), 278: (3, 1, 16), 279: (4, 1, len(data))}
    tags |= {int(name[1:]): value for name, value in changes.items()}
    entries = [struct.pack("<HHLL", tag, *value) for tag, value in sorted(tags.items()) if value]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<L", 8)
    return head.ljust(2**20, b"\0") + data


def tiff_of_a_large_tile(side: int = 22000) -> bytes:
    data, number = zlib.compress(bytes(side * side), 1), (4, 1, side)
    tile = {"t322": number, "t323": number, "t324": (4, 1, 2**20), "t325": (4, 1, len(data))}
    return tiff(data, t259=(3, 1, 8), t273=None, t278=None, t279=None, **tile)


def radiance(side: int) -> bytes:
    """Run-length coded, of one colour."""
    runs = b"".join(bytes((128 + min(127, side - x), 100)) for x in range(0, side, 127))
    return f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {side} +X {side}\n".encode() + (
        side * (b"\x02\x02" + struct.pack(">H", side) + 4 * runs)
    )


def icon(content: bytes) -> bytes:
    """One whose table says 16x16."""
    return struct.pack("<HHHBBBBHHLL", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


def apple_icon(content: bytes) -> bytes:
    """One whose table says 1024x1024."""
    return b"icns" + struct.pack(">L", len(content) + 16) + b"ic10" + struct.pack(">L", len(content) + 8) + content


TEXT = b"key\0\0" + zlib.compress(bytes(2 * 10**8))
ORIENTATIONS = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03" + struct.pack(">LLL", 2 * 10**7, 26, 0) + bytes(4 * 10**7)
# 700 kB that 20,000 tags share: 14 GB for a reader that keeps each for itself.
TAGS = b"".join(struct.pack(">HHLL", tag, 7, 7 * 10**5, 240014) for tag in range(1000, 21000))
TAGS_OF_ONE_PLACE = b"MM\0*\0\0\0\x08" + struct.pack(">H", 20000) + TAGS + bytes(4 + 7 * 10**5)

BOMBS: dict[str, Callable[[], bytes]] = {
    "50000x50000.png": lambda: png(50000, 50000, 2),
    "transparent.png": lambda: png(13000, 13000, 6),
    "text.png": lambda: png(16, 16, 2, (b"zTXt", TEXT)),
    "international-text.png": lambda: png(16, 16, 2, (b"iTXt", b"key\0\1\0\0" + TEXT[4:])),
    "profile.png": lambda: png(16, 16, 2, (b"iCCP", TEXT)),
    "claims-65500.jpg": lambda: jpeg_that_claims(65500),
    "claims-13000-progressive.jpg": lambda: jpeg_that_claims(13000, progressive=True),
    "scans.jpg": jpeg_of_many_scans,
    "claims-16383.webp": lambda: webp_that_claims(16383),
    "claims-13000.webp": lambda: webp_that_claims(13000),
    "claims-65535.tif": lambda: tiff(t256=(4, 1, 65535), t257=(4, 1, 65535)),
    "tile.tif": tiff_of_a_large_tile,
    "samples.tif": lambda: tiff(t277=(3, 1, 1000)),  # Pillow logs it
    "claims-8000.hdr": lambda: radiance(8000),
    "icon.ico": lambda: icon(png(13000, 13000, 0)),
    "icon.icns": lambda: apple_icon(saved(Image.new("RGBA", (5000, 5000)), "JPEG2000")),
}
DUDS: dict[str, Callable[[], bytes]] = {  # harmless in all that decoding needs
    "orientations.png": lambda: png(16, 16, 2, (b"eXIf", ORIENTATIONS)),
    "tags.tif": lambda: tiff(**{f"t{tag}": (3, 2**32 - 1, 0) for tag in range(1000, 60000)}),
    "one-place.tif": lambda: tiff(bytes(10**7), **{f"t{tag}": (7, 10**7, 2**20) for tag in range(1000, 3000)}),
    "one-place.png": lambda: png(16, 16, 2, (b"eXIf", TAGS_OF_ONE_PLACE)),
}
EITHER: dict[str, Callable[[], bytes]] = {  # as the decoder's version takes it
    "claims-8000.jpg": lambda: jpeg_that_claims(8000),
    "bits.tif": lambda: tiff(t258=(3, 2**32 - 1, 0)),
    "strips.tif": lambda: tiff(t273=(4, 2**31, 8), t279=(4, 2**31, 8)),
}

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n%%EOF\n"


def press_photo(content: bytes) -> bytes:
    """An IPTC file, which holds another."""
    fields = {(3, 20): b"\0\x10", (3, 30): b"\0\x10", (3, 60): b"\1\0", (3, 120): b"\5", (8, 10): content}
    return b"".join(b"\x1c" + bytes(tag) + struct.pack(">H", len(data)) + data for tag, data in fields.items())


PROGRAMS: dict[str, Callable[[], bytes]] = {
    "postscript.png": lambda: POSTSCRIPT,
    "postscript.eps": lambda: POSTSCRIPT,
    "with-preview.jpg": lambda: struct.pack("<LLL", 0xC6D3D0C5, 32, len(POSTSCRIPT)).ljust(32, b"\0") + POSTSCRIPT,
    "press-photo.tif": lambda: press_photo(POSTSCRIPT),
    "metafile.wmf": lambda: b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 16, 16, 72) + b"\1\0\x09\0" * 9,
}
