"""95 % intervals of a mean over few seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

Interval = Callable[[Sequence[float]], tuple[float, float]]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; of a single value, that value."""
    from scipy.stats import sem, t

    mean = statistics.mean(values)
    half = sem(values) * t.ppf(0.975, len(values) - 1) if len(values) > 1 else 0.0
    return float(mean - half), float(mean + half)


def bootstrapped(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean: percentile bootstrap over the seeds (Efron and Tibshirani, 1993, chapter 13).

    Of three values it is the smallest and the largest, since one sample in 27 has the smallest alone.
    """
    import numpy as np
    from scipy.stats import bootstrap

    if len(set(values)) == 1:  # which SciPy warns of
        return values[0], values[0]
    generator = np.random.default_rng(0)
    found = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=generator)
    low, high = found.confidence_interval
    return float(low), float(high)
