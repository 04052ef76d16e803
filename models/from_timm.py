"""timm's classification networks, as ``timm/<name>``, by the interface that they share."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor

from lwm.runtime.errors import InputError

PREFIX = "timm/"


def timm_network(architecture: str, classes: int, image_size: int) -> Any:
    """timm's own network of that name, freshly initialised. Raises InputError for one that cannot be served."""
    network = _created(architecture, image_size, num_classes=classes)
    if not all(hasattr(network, each) for each in ("forward_features", "forward_head", "get_classifier")):
        raise InputError(f"{architecture} has no forward_features, forward_head and get_classifier")
    return network


def timm_config(architecture: str) -> Any:
    """How timm's own weights want their images: mean, std, input_size, crop_pct, interpolation. Raises InputError."""
    timm, name = _listed(architecture)
    return timm.get_pretrained_cfg(name)


def timm_weights(architecture: str, image_size: int) -> dict[str, Tensor]:
    """timm's own weights, which are downloaded. Raises InputError if there are none, or if they cannot be had."""
    if not timm_config(architecture).has_weights:
        raise InputError(f"timm has no weights for {architecture}")
    try:
        weights: dict[str, Tensor] = _created(architecture, image_size, pretrained=True).state_dict()
    except InputError:
        raise
    except Exception as error:  # of the hub's client, of the network and of the file
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise InputError(f"timm's weights for {architecture} cannot be downloaded ({reason})") from error
    return weights


def timm_names(architecture: str, classes: int) -> dict[str, Tensor]:
    """timm's own names of the network's tensors, in their order, with tensors of their shapes. Raises InputError."""
    own: dict[str, Tensor] = (
        _listed(architecture)[0].create_model(architecture.removeprefix(PREFIX), num_classes=classes).state_dict()
    )
    return own


def _listed(architecture: str) -> tuple[Any, str]:
    """timm, and the name that it lists. No other name reaches timm, which takes some for an address."""
    try:
        import timm
    except ImportError as error:
        raise InputError(f"{architecture} needs timm: pip install timm") from error
    name = architecture.removeprefix(PREFIX)
    known = timm.list_models()
    if name not in known and name not in timm.list_models(pretrained=True):
        near = difflib.get_close_matches(name, known, n=1)
        raise InputError(f"timm lists no {name!r}" + (f"; did you mean {PREFIX}{near[0]}?" if near else ""))
    return timm, name


def _created(architecture: str, image_size: int, **options: Any) -> Any:
    timm, name = _listed(architecture)
    config = timm.get_pretrained_cfg(name)
    if config and config.fixed_input_size and image_size != config.input_size[-1]:
        options["img_size"] = image_size
    try:
        return timm.create_model(name, **options)
    except (AssertionError, TypeError) as error:
        if "img_size" not in options:
            raise
        reason = (str(error) or "it has one size only").splitlines()[0][:150]
        raise InputError(f"{architecture} does not take images of {image_size} px ({reason})") from error
