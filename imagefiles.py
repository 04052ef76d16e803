"""Image files, from any format that Pillow or OpenCV reads to uint8 arrays. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from errors import InputError, import_opencv, warn

OPENCV_ONLY_SUFFIXES = {".exr", ".hdr", ".pic", ".ras", ".sr"}


def image_files(folder: Path) -> list[Path]:
    """The files in a folder that have an image's suffix, in the order of their names."""
    suffixes = set(Image.registered_extensions()) | OPENCV_ONLY_SUFFIXES
    return sorted(e for e in folder.iterdir() if e.suffix.lower() in suffixes and not e.name.startswith("."))


def decode_files(paths: Sequence[Path], image_size: int, skip_bad_images: bool) -> tuple[list[Path], np.ndarray]:
    """The files that could be read, and their pixels, uint8 (n, 3, size, size)."""
    pixels, kept = [], []
    for path in tqdm(paths, desc=f"reading {paths[0].parent.name}", disable=None, leave=False):
        try:
            pixels.append(decode_image(path, image_size))
            kept.append(path)
        except InputError:
            if not skip_bad_images:
                raise
    if len(kept) < len(paths):
        skipped = len(paths) - len(kept)
        warn(f"{skipped} of {len(paths)} images in {paths[0].parent} cannot be read and are skipped")
    if not kept:
        raise InputError(f"{paths[0].parent}: none of its {len(paths)} images can be read")
    return kept, np.stack(pixels)


def decode_image(path: str | Path, size: int) -> np.ndarray:
    """One image file as uint8 (3, size, size): upright, RGB, its shorter side scaled to ``size``, its centre cut out.

    Pillow reads it, or OpenCV where Pillow does not know the format. Raises InputError for a file neither can read.
    """
    try:
        try:
            with Image.open(path) as opened:
                opened.load()
                image = _to_rgb(ImageOps.exif_transpose(opened))
        except UnidentifiedImageError:
            image = _decode_with_opencv(path)
    except InputError:
        raise
    except Exception as error:  # each decoder has errors of its own kinds for a file that is broken
        raise InputError(f"{path}: the image cannot be read ({error}); repair or remove it") from error
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1).copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel
        values = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # 0..1 where nothing is larger, else 0..255
        values = np.asarray(image)
        values = values * 255 if values.max(initial=0) <= 1 else values
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _decode_with_opencv(path: str | Path) -> Image.Image:
    content = np.fromfile(path, np.uint8)
    cv2 = import_opencv()
    pixels = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    if pixels is None:
        raise InputError(f"{path}: is not an image that Pillow or OpenCV reads; repair or remove it")
    return Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
