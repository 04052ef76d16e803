"""95 % interval of a mean over few seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy.stats import sem, t


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; of a single value, that value."""
    mean = statistics.mean(values)
    half = sem(values) * t.ppf(0.975, len(values) - 1) if len(values) > 1 else 0.0
    return float(mean - half), float(mean + half)
