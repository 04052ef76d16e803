"""Values of any depth and range to 0..255, by the rules in docs/own-data.md. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from lwm.runtime.errors import InputError, log

STRIP = 64  # rows that are scaled at a time: no second image of floats takes memory
LEVELS = 16  # of 256; an image that would have fewer is nearly constant
BEYOND = 0.05  # of a range of floats: what resizing leaves above and below it is cut off
RANGES = ((0, 1), (-1, 1), (0, 255))  # of floats
_said: list[bool] = []

Strips = Callable[[], Iterable[np.ndarray]]  # the values from top to bottom, STRIP rows at a time; called twice


def to_bytes(strips: Strips, stretch: bool = True) -> np.ndarray:
    """The image as uint8, (H, W) or (H, W, channels). Raises InputError for values that are not finite.

    With ``stretch`` an image that would be nearly constant is scaled by its own minimum and maximum.
    """
    lows, highs, floating = [], [], False
    for strip in strips():
        lows.append(strip.min())
        highs.append(strip.max())
        floating = strip.dtype.kind == "f"
    low, high = (float(value) for value in (np.min(lows), np.max(highs)))  # NaN if one value is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("has values that are infinite or no numbers (NaN); replace them or remove it")
    bottom, top = value_range(low, high, floating)
    if stretch and low < high and (min(high, top) - max(low, bottom)) * 255 < LEVELS * (top - bottom):
        bottom, top = low, high
        if not _said:
            _said.append(True)
            log.warning(
                f"values of {low:g} to {high:g} fill no usual range: such an image is scaled by its own minimum and "
                "maximum (docs/own-data.md)"
            )
    factor = 255 / (top - bottom)
    scaled = (np.clip((strip.astype(np.float64) - bottom) * factor, 0, 255) + 0.5 for strip in strips())
    return np.concatenate([strip.astype(np.uint8) for strip in scaled])


def value_range(low: float, high: float, floating: bool) -> tuple[float, float]:
    """The values that become 0 and 255 in an image of values from ``low`` to ``high``."""
    for bottom, top in RANGES if floating else ():
        beyond = BEYOND * (top - bottom)
        if bottom - beyond <= low and high <= top + beyond:
            return bottom, top
    # The least even number of bits, 8 or more, that holds all of them: cameras have 10, 12, 14 or 16.
    signed = low < 0
    bits = math.ceil(max(high, -low - 1, 0)).bit_length() + signed
    bits = max(8, bits + bits % 2)
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0, 2.0**bits - 1)


def tone_mapped(radiance: np.ndarray) -> np.ndarray:
    """Radiance float32 (H, W, C), changed in place to 0..1: as it is if none is above 1, else x (1 + x/w^2) / (1 + x).

    Reinhard's extended curve; w is the largest value. A median above 1 is first made 1, as by a camera's exposure.
    """
    step = max(1, max(radiance.shape) // 500)
    exposure = max(1.0, float(np.median(radiance[::step, ::step])))
    white = max(1.0, float(radiance.max()) / exposure)
    for row in radiance:
        row /= exposure
        row *= (1 + row / white**2) / (1 + row)
    return radiance
