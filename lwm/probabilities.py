"""From logits to answers, without torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def form_of(loss_form: str) -> str:
    """How the logits of a network become probabilities, by the form of the loss that it was trained with."""
    return "sigmoid" if loss_form == "binary" else "softmax"


def probabilities_of(logits: np.ndarray, form: str) -> np.ndarray:
    """float64 (n, classes) of logits (n, classes); those of ``sigmoid`` do not add up to 1."""
    logits = np.asarray(logits, np.float64)
    if form == "sigmoid":
        return np.exp(-np.logaddexp(0, -logits))
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def likeliest(logits: np.ndarray, form: str, names: Sequence[str], count: int = 1) -> list[tuple[str, float]]:
    """The ``count`` likeliest classes with their probabilities, of one image's logits (classes,).

    In the order of the logits, which still differ where probabilities are rounded to the same number.
    """
    order = np.argsort(-logits, kind="stable")[:count]
    probabilities = probabilities_of(logits[None], form)[0]
    return [(names[index], float(probabilities[index])) for index in order]
