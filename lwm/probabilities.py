"""From logits to answers, without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from lwm.runtime.errors import InputError


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """float64 (n, classes) of logits (n, classes): their softmax, whatever loss the network was trained with."""
    logits = np.asarray(logits, np.float64)
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def likeliest(logits: np.ndarray, names: Sequence[str], count: int = 1) -> list[tuple[str, float]]:
    """The ``count`` likeliest classes with their probabilities, of one image's logits (classes,).

    In the order of the logits, which still differ where probabilities are rounded to the same number.
    """
    order = np.argsort(-logits, kind="stable")[:count]
    probabilities = probabilities_of(logits[None])[0]
    return [(names[index], float(probabilities[index])) for index in order]


# "unknown" --------------------------------------------------------------------------------------------------------


def familiarity(logits: np.ndarray) -> np.ndarray:
    """(n,): how much each image of logits (n, classes) is like those of a class that was taught.

    The log of the sum of exponentials (the energy score of Liu et al., NeurIPS 2020).
    """
    logits = np.asarray(logits, np.float64)
    most = logits.max(1)
    return most + np.log(np.exp(logits - most[:, None]).sum(1))


def share_of(text: str) -> float:
    """The value of ``--unknown``. Raises InputError if it is not one."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise InputError(f"--unknown is {text!r}: a share from 0 to 1 is needed, such as 0.05")


def is_unknown(logits: np.ndarray, quantiles: Sequence[float], share: float) -> np.ndarray:
    """bool (n,): whether the image of logits (n, classes) is less familiar than this share of those of taught classes.

    ``quantiles`` are those of a checkpoint's "unknown", at equal steps from 0 to 100 %. Raises InputError if empty.
    """
    if not quantiles:
        raise InputError("--unknown: no images were held back to judge it by; train the network with --calibration 0.1")
    return familiarity(logits) < np.interp(share, np.linspace(0, 1, len(quantiles)), quantiles)
