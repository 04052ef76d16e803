"""Image files, from any format that Pillow or OpenCV reads to uint8 arrays. Needs no torch.

A file may come from a stranger: none takes more memory than is said here, hangs, runs a program or writes to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from lwm.images import depth
from lwm.runtime import progress
from lwm.runtime.errors import InputError, log

MEMORY = 1_200_000_000  # bytes that the pixels of one image take while it is read: Pillow's limit, 179 Mpx, fits
LARGEST = 1600  # px of a whole image's longer side, where one is shown
FILE_SIZE = 2**29  # bytes of a file; some decoders hold all of it besides
JPEG_WORK = 10**10  # scans x pixels, some seconds: a progressive JPEG of 100 kB can hold thousands of scans

# Pillow hands EPS to Ghostscript and WMF to Windows, and opens what lies inside an IPTC file as any format, EPS too.
# The JPEG or JPEG 2000 inside a BLP or ICNS file may be larger than the file says, which is found when it is decoded.
# Of FITS it takes signed values for unsigned, and leaves their zero point out.
REFUSED_FORMATS = {"BLP", "EPS", "FITS", "ICNS", "IPTC", "WMF"}
OPENCV_ONLY_SUFFIXES = {".hdr", ".pic", ".ras", ".sr"}
# Photographs that neither reads: taken for images, so that they are named or counted, and do not vanish. Many raw ones
# are TIFF files, whose first image is a small preview.
RAW_SUFFIXES = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}
UNREAD_SUFFIXES = RAW_SUFFIXES | {".avif", ".exr", ".fit", ".fits", ".heic", ".heif", ".jxl"}
# How the files start that OpenCV alone reads: Radiance, PAM. It gets no others, since it would be a second parser for
# a file that broke the first, and its libraries write to stderr. Its packages are built without OpenEXR.
OPENCV_ONLY_STARTS = (b"#?RADIANCE", b"#?RGBE", b"P7")
# The memory that reading a pixel takes, its file aside: the most that was measured over a format's variants; 24 for
# the formats that are not here, whose decoders keep the image in several forms.
BYTES_A_PIXEL = dict.fromkeys(("BMP", "DIB", "GIF", "JPEG", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA"), 6)
BYTES_A_PIXEL |= {"JPEG2000": 28, "TIFF": 14}
UPRIGHT = {  # what undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler its errors go to stderr


def is_image(name: str) -> bool:
    """Whether a file's name has an image's suffix, and is not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _suffixes()


@functools.cache
def _suffixes() -> set[str]:
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind not in REFUSED_FORMATS}
    return known | OPENCV_ONLY_SUFFIXES | UNREAD_SUFFIXES


def decode_files(paths: Sequence[Path], image_size: int, skip_bad_images: bool) -> tuple[list[Path], np.ndarray]:
    """The files that could be read, and their pixels, uint8 (n, 3, size, size)."""
    folder = paths[0].parent
    bar = progress.bar(paths, desc=f"reading {folder.name}")
    pixels, bad = decode_all(bar, image_size, skip_bad_images)
    if bad:
        log.warning(f"{len(bad)} of {len(paths)} images in {folder} cannot be read and are skipped")
    if not len(pixels):
        raise InputError(f"{folder}: none of its {len(paths)} images can be read")
    return [path for index, path in enumerate(paths) if index not in bad], pixels


def decode_all(paths: Iterable[Path], image_size: int, skip_bad_images: bool) -> tuple[np.ndarray, dict[int, str]]:
    """The pixels of the files that can be read, uint8 (n, 3, size, size), and what is wrong with the others, by index.

    Raises InputError for the first file that cannot be read, unless those are skipped.
    """
    good, bad = [], {}
    for index, path in enumerate(paths):
        try:
            good.append(decode_image(path, image_size))
        except InputError as error:
            if not skip_bad_images:
                raise
            bad[index] = str(error)
    return np.stack(good) if good else np.empty((0, 3, image_size, image_size), np.uint8), bad


def decode_image(path: str | Path, size: int) -> np.ndarray:
    """One image file as uint8 (3, size, size): upright, RGB, its shorter side scaled to ``size``, its centre cut out.

    Pillow reads it, or OpenCV if Pillow does not know the format. Raises InputError for a file neither can read.
    """
    return _decode(path, lambda image: _fit(image, size))


def decode_whole(path: str | Path) -> np.ndarray:
    """The whole image as uint8 (3, H, W), upright and RGB, scaled to ``LARGEST`` px if its longer side is longer.

    Its middle square is what ``decode_image`` cuts out. Raises InputError as that does.
    """
    return _decode(path, _within_largest)


def _decode(path: str | Path, shrink: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_file(path)
            try:
                image = _decode_with_pillow(path, shrink)
            except UnidentifiedImageError:
                image = shrink(_decode_with_opencv(path))
            return np.asarray(image).transpose(2, 0, 1).copy()
    except Exception as error:  # each decoder has errors of its own kinds for a file that is broken
        why = str(error) or type(error).__name__
        if not isinstance(error, InputError):
            why = f"the image cannot be read ({why}); repair, convert or remove it"
        # One line, whatever a stranger put into the file or its name: control characters would reach the terminal.
        raise InputError(printable(f"{path}: {why}")) from error


def shorter_side(path: Path) -> int | None:
    """The shorter side of an image in px, by its header alone; None if Pillow cannot tell."""
    try:
        _check_file(path)
        with warnings.catch_warnings(action="ignore"), _opened(path) as image:
            return min(image.size)
    except Exception:  # as many kinds as there are formats; decoding says what is wrong
        return None


def printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _check_file(path: str | Path) -> None:
    """Opened is what has an end: a pipe would wait for ever for its writer, and a device need not have one."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError("is not a file; remove it")
    if status.st_size > FILE_SIZE:
        raise InputError(f"is larger than {FILE_SIZE >> 20} MiB; make it smaller or remove it")
    if Path(path).suffix.lower() in RAW_SUFFIXES:
        raise InputError("is a raw photograph; convert or remove it")


def _decode_with_pillow(path: str | Path, shrink: Callable[[Image.Image], Image.Image]) -> Image.Image:
    with _opened(path) as opened:
        opened.tile = [_mended(tile) for tile in opened.tile]
        _check_work(path, opened)
        lower = _lower_bytes(path, opened.tile)
        _load(opened)
        return _upright(opened, lower, shrink)


def _upright(
    image: Image.Image, lower: Image.Image | None, shrink: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    orientation = image.getexif().get(ExifTags.Base.Orientation) if len(image.info.get("exif", "")) < 2**20 else 1
    # Turned when it is small: a second copy of a large photo would double the memory.
    small = shrink(_to_rgb(image, lower))
    return small.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else small


def _opened(path: str | Path) -> ImageFile.ImageFile:
    Image.init()
    return Image.open(path, formats=[kind for kind in Image.ID if kind not in REFUSED_FORMATS])


def _load(opened: ImageFile.ImageFile) -> None:
    with _without_stderr() if opened.format == "TIFF" else contextlib.nullcontext():
        opened.load()


def _mended(tile: ImageFile._Tile) -> ImageFile._Tile:
    """Two ways in which Pillow would lose or mix up bytes: what it reads is then what the file has."""
    name, *more = _arguments(tile)
    if tile.codec_name == "libtiff" and name in ("I;16BS", "I;32BS", "F;32BF"):  # libtiff has swapped them already
        return tile._replace(args=(name.replace("B", "N"), *more))
    if tile.codec_name == "ppm" and (name, *more) == ("RGB", 65535):  # it would round them to 8 bits
        return tile._replace(codec_name="raw", args=("RGB;16B", 0, 1))
    return tile


def _arguments(tile: ImageFile._Tile) -> tuple:
    """Of its decoder; the first one says how a pixel's bytes lie."""
    return tile.args if isinstance(tile.args, tuple) else (tile.args,)


def _lower_bytes(path: str | Path, tiles: list[ImageFile._Tile]) -> Image.Image | None:
    """The lower bytes of colours with 16 bits, of which Pillow keeps the upper ones; None if it has all there is.

    They are read as if the file had the other byte order.
    """
    swapped, other = [], {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    for tile in tiles:
        name, *more = _arguments(tile)
        if not re.fullmatch("(LA|RGB[AX]?);16[LBN]", str(name)):
            return None
        # Pillow has no other order for LA: its four bytes are taken for four channels.
        name = "RGBA" if name == "LA;16B" else name[:-1] + other[name[-1]]
        swapped.append(tile._replace(args=(name, *more) if more else name))
    if not swapped:  # a decoder that is no codec of Pillow's own
        return None
    with _opened(path) as again:
        again.tile = swapped
        _load(again)
    if swapped[0].args == "RGBA":
        return Image.merge("RGBA", [again.getchannel(channel) for channel in (1, 1, 1, 3)])
    return again


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """libtiff writes to the descriptor what it finds wrong, and Pillow gives it no other place."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_work(path: str | Path, image: ImageFile.ImageFile) -> None:
    """Refuses, by what the header says, what would take too much memory or time."""
    pixels, cost, scans = image.width * image.height, BYTES_A_PIXEL.get(image.format or "", 24), 1
    if isinstance(image, TiffImageFile):  # a whole tile is decoded, however small the image
        pixels = max(pixels, int(image.tag_v2.get(322, 0)) * int(image.tag_v2.get(323, 0)))
        bits = image.tag_v2.get(258, (1,))
        if image.tag_v2.get(284) == 2 and len(bits) > 1 and max(bits) > 8:  # Pillow mixes up their bytes
            raise InputError("has channels of 16 bits in separate planes; save them pixel by pixel, or remove it")
    if image.mode not in ("1", "L", "P", "RGB") or image.has_transparency_data:
        cost = max(cost, 12)  # it becomes RGB in several steps
    if image.mode.startswith("RGB") and any(";16" in str(tile.args) for tile in image.tile):
        cost = max(cost, 24)  # it is decoded twice
    if "progressive" in image.info:
        cost = max(cost, 10)
        scans = Path(path).read_bytes().count(b"\xff\xda")
    if pixels * cost > MEMORY or pixels * scans > JPEG_WORK:
        raise InputError(
            f"reading {pixels} pixels of this kind ({image.format}, {image.mode}, {scans} scans) takes too much memory "
            "or time; make it smaller, save it in another format, or remove it"
        )


def fitted(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) as ``decode_image`` would give it from a file. Raises InputError for another array."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise InputError(f"an image as uint8 (H, W, 3) is needed, not {pixels.dtype} {pixels.shape}")
    return np.asarray(_fit(Image.fromarray(pixels), size)).transpose(2, 0, 1).copy()


def from_pillow(image: Image.Image, size: int) -> np.ndarray:
    """A picture of Pillow's as ``decode_image`` would give it from its file; its colours have 8 bits there already."""
    return np.asarray(_upright(image, None, lambda whole: _fit(whole, size))).transpose(2, 0, 1).copy()


def _within_largest(image: Image.Image) -> Image.Image:
    if max(image.size) <= LARGEST:
        return image
    width, height = (max(1, round(side * LARGEST / max(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _fit(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _to_rgb(image: Image.Image, lower: Image.Image | None) -> Image.Image:
    """On white, and scaled as docs/own-data.md says; ``lower`` has the lower bytes of colours with 16 bits."""
    tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    signed = 2 in tags.get(339, ())
    if image.mode == "La":
        image = image.convert("LA")
    if lower is not None:
        colours = Image.fromarray(depth.to_bytes(lambda: _wide_strips(image, lower, slice(3))))
        if image.mode == "RGBA":
            colours.putalpha(Image.fromarray(depth.to_bytes(lambda: _wide_strips(image, lower, 3), stretch=False)))
        image = colours
    elif image.mode.startswith("I") or image.mode == "F" or (image.mode == "L" and signed):
        unsigned = image.mode == "I" and tags.get(258) == (32,) and not signed
        kind = np.int8 if image.mode == "L" else np.uint32 if unsigned else None
        grey = depth.to_bytes(lambda: (strip.view(kind) if kind else strip for strip in _strips(image)))
        # Pillow turns what is printed on white, photometric interpretation 0, only if it has 8 bits.
        image = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        if np.max(image.getchannel("A").getextrema()) >= depth.LEVELS:  # else nothing would be left of it
            white = Image.new("RGB", image.size, "white")
            white.paste(image, mask=image)
            return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[np.ndarray]:
    for top in range(0, image.height, depth.STRIP):
        yield np.asarray(image.crop((0, top, image.width, min(top + depth.STRIP, image.height))))


def _wide_strips(upper: Image.Image, lower: Image.Image, channels: int | slice) -> Iterator[np.ndarray]:
    for high, low in zip(_strips(upper), _strips(lower), strict=True):
        yield high[..., channels].astype(np.uint16) << 8 | low[..., channels]


def _decode_with_opencv(path: str | Path) -> Image.Image:
    pixels = None
    with open(path, "rb") as file:
        if file.read(10).startswith(OPENCV_ONLY_STARTS):
            cv2 = import_opencv()
            pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if pixels is None:
        raise InputError("is not an image of a kind that is read (docs/own-data.md); repair, convert or remove it")
    if pixels.dtype != np.uint8:
        pixels = depth.tone_mapped(pixels) if pixels.dtype.kind == "f" else pixels
        whole = pixels
        pixels = depth.to_bytes(lambda: (whole[top : top + depth.STRIP] for top in range(0, len(whole), depth.STRIP)))
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))


def import_opencv() -> ModuleType:
    """The cv2 module. Raises InputError if the system lacks the libraries that it draws windows with."""
    # Read when cv2 is first imported. Reading a pixel takes up to 28 bytes, so 1.2 GB as in MEMORY.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "40000000")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # what is wrong with an image is said by its reader
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            f"OpenCV cannot be loaded ({error}); on a machine without a screen use "
            "'pip uninstall opencv-python' and 'pip install opencv-python-headless'"
        ) from error
    return cv2
