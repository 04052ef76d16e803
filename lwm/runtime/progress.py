"""Watching a run: a bar and a line an epoch on stderr, and on stdout what was asked for."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from lwm.runtime.errors import log


def bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm's, if somebody watches a terminal: not with ``--quiet``, nor in the other processes of a torchrun job."""
    return tqdm(items, disable=None if log.isEnabledFor(logging.INFO) else True, leave=False, **options)


def results(settings: Any) -> Callable[..., None]:
    """``print`` for what was asked for: to stdout, or with ``--json``, which has stdout to itself, to stderr."""
    return functools.partial(print, file=sys.stderr if settings.json else sys.stdout, flush=True)


def print_json(settings: Any, values: dict[str, Any]) -> None:
    """With ``--json``, one JSON object."""
    if settings.json:
        print(json.dumps(values))


def line_of(row: dict[str, Any], epochs: int, seconds_left: float) -> str:
    """An epoch's loss with its terms, accuracies in percent, speed and the time left."""
    terms = [f"{name} {row[name]:.3g}" for name in ("classification", "distillation", "attention") if name in row]
    shown = [f"loss {row['loss']:.3g} ({', '.join(terms)})", f"training accuracy {row['accuracy']:.1f} %"]
    if row.get("test_accuracy") is not None:
        shown.append(f"test accuracy {row['test_accuracy']:.1f} % (head)")
    shown.append(f"{row['images_per_second']:.0f} images/s")
    if seconds_left:
        shown.append(f"{seconds_left / 60:.0f} min left" if seconds_left >= 90 else f"{seconds_left:.0f} s left")
    return f"epoch {row['epoch']}/{epochs}: {', '.join(shown)}"
