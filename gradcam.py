"""Draw where a network looks for a class: Grad-CAM over any image, at any layer of a checkpoint.

python3 gradcam.py --checkpoint runs/first/student_model.pth --image cat.png --class-name cat
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from lwm.models import Network
from torch import Tensor, nn

from lwm import models
from lwm.attention import autograd_map
from lwm.classifiers import NAMES, answer_with
from lwm.images.batches import to_input
from lwm.images.files import decode_image, decode_whole
from lwm.reporting import plots
from lwm.runtime.checkpoint import load, restore_model
from lwm.runtime.errors import InputError, listed, log, one_line_errors
from lwm.runtime.files import make_folder, require_folder
from lwm.runtime.settings import read_settings


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    settings = read_settings("gradcam", argv, classifier=NAMES)
    output = Path(settings.output)
    require_folder("--output", output.parent)
    with settings.naming("output"):
        if output.is_dir():
            raise InputError(f"{output} is a folder; the name of a PNG file is needed")
        for name in ("checkpoint", "image"):
            if output.resolve() == Path(getattr(settings, name)).resolve():
                raise InputError(f"{output} is the --{name} itself and would be replaced; take another name")
    with settings.naming("model"):
        own = models.builder(settings.model)
    with settings.naming("checkpoint"):
        checkpoint = load(settings.checkpoint)
        model, checkpoint = answer_with(restore_model(checkpoint, own).eval(), checkpoint, settings.classifier)
    names = checkpoint["class_names"]
    if settings.class_name is not None and settings.class_name not in names:
        raise InputError(f"--class-name {settings.class_name}: the checkpoint knows {listed(names)}")
    with settings.naming("image"):
        pixels, whole = decode_image(settings.image, checkpoint["image_size"]), decode_whole(settings.image)

    images = to_input(torch.from_numpy(pixels)[None], checkpoint["mean"], checkpoint["std"])
    answer, layers = answer_and_layers(model, images)
    shown = answer if settings.class_name is None else names.index(settings.class_name)
    layer: str = settings.layer or model.last_layer
    if layer not in layers:
        raise InputError(
            f"--layer {layer} makes no feature map; for example {', '.join(layers[:4])}, {model.last_layer}"
        )
    heat = autograd_map(model, images, torch.tensor([shown]), layer)[0].numpy()

    make_folder(output.parent)
    if not heat.any():
        log.warning(f"the map of {names[shown]} at {layer} is zero everywhere: nothing here speaks for the class")
    plots.photograph(whole, heat, f"Grad-CAM of {names[shown]}", output)
    print(f"answer ({checkpoint['classifier']}): {names[answer]}; the map of {names[shown]} at {layer} is in {output}")


def answer_and_layers(model: Network, images: Tensor) -> tuple[int, list[str]]:
    """The position of the class that the model answers for one image, and the layers that make a feature map."""
    layers: list[str] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3]:  # not channels last
            layers.append(name)

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    with torch.no_grad():
        answer = int(model(images).logits.argmax(1))
    for hook in hooks:
        hook.remove()
    return answer, layers


if __name__ == "__main__":
    sys.exit(main())
