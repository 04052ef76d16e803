"""Grad-CAM (Selvaraju et al., ICCV 2017, section 3): where a network looks for a class.

With A the feature map (C, h, w) and y_c the logit of class c,

    alpha_k = mean over pixels of d y_c / d A_k          Q = ReLU(sum_k alpha_k A_k)

``closed_form_map`` is Q at the last feature map of a network that ends in global average pooling and one linear
layer: there d y_c / d A_k(i, j) = W_ck / (h w) exactly, so Q needs no second backward pass. ``differentiated_map`` is Q
at the last feature map where more stands before the head, ``autograd_map`` at any layer of any network. All can be
differentiated, in A and in alpha.

As a script, an overlay of any image for any class of a checkpoint:

    python3 gradcam.py --checkpoint runs/first/student_model.pth --image cat.png --class-name cat
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import InputError, RunError, import_opencv, one_line_errors

if TYPE_CHECKING:  # torch is imported where it is used: --help answers at once
    import numpy as np
    from torch import Tensor, nn

    from models import Network, Output


def closed_form_map(features: Tensor, head_weight: Tensor, classes: Tensor, relu: bool = True) -> Tensor:
    """Grad-CAM at the feature map that pooling and the linear head see.

    features (B, C, h, w), head_weight (outputs, C), classes int64 (B,); returns (B, h, w), >= 0 with ``relu``.
    """
    # index_select, not head_weight[classes]: the backward of the latter adds in no fixed order on several threads.
    rows = head_weight.index_select(0, classes)
    height, width = features.shape[2:]
    weighted = rows.unsqueeze(1).bmm(features.flatten(2)).squeeze(1) / (height * width)
    return (weighted.relu() if relu else weighted).unflatten(1, (height, width))


def differentiated_map(
    logits: Tensor, features: Tensor, classes: Tensor, relu: bool = True, create_graph: bool = False
) -> Tensor:
    """Grad-CAM at ``features`` (B, C, h, w), from which ``logits`` (B, outputs) were computed with their graph.

    classes int64 (B,); returns (B, h, w), >= 0 with ``relu``. ``create_graph`` keeps the graph of alpha, so that a
    loss on the map reaches the parameters through A and through alpha; without it the map is detached.
    """
    import torch

    with torch.enable_grad():
        scores = logits.gather(1, classes.unsqueeze(1)).sum()
    (gradients,) = torch.autograd.grad(scores, features, create_graph=create_graph, retain_graph=True)
    maps = (gradients.mean((2, 3), keepdim=True) * features).sum(1)
    maps = maps.relu() if relu else maps
    return maps if create_graph else maps.detach()


def last_map(output: Output, head_weight: Tensor | None, classes: Tensor) -> Tensor:
    """The detached map (B, h, w) at the last feature map; ``head_weight`` is that of models.head_weight."""
    if head_weight is None:
        return differentiated_map(output.logits, output.features, classes)
    return closed_form_map(output.features, head_weight, classes).detach()


def require_closed_form(model: Network, images: Tensor) -> None:
    """Compare the closed form with automatic differentiation, in eval mode, where the network is said to have it.

    images (B, 3, H, W), normalised. Raises RunError where the two differ.
    """
    import torch

    if not model.closed_form:
        return
    model.eval()
    with torch.no_grad():
        output = model(images)
    classes = output.logits.argmax(1)
    weight = model.fc.weight.detach()
    closed = closed_form_map(output.features, weight, classes, relu=False)
    difference = (closed - autograd_map(model, images, classes, model.last_layer, relu=False)).abs().max()
    terms = closed_form_map(output.features.abs(), weight.abs(), classes)  # a map is a difference of such
    if not difference <= 1e-4 * terms.max():
        raise RunError(f"Grad-CAM in closed form differs from automatic differentiation by {difference.item():.2g}")


def autograd_map(
    model: nn.Module, images: Tensor, classes: Tensor, layer: str, relu: bool = True, create_graph: bool = False
) -> Tensor:
    """Grad-CAM at the named layer, by differentiating the logits of ``classes`` int64 (B,).

    images (B, 3, H, W), normalised; returns (B, h, w). ``relu`` and ``create_graph`` are as in ``differentiated_map``.
    The mode of the model (train or eval) is the caller's. Raises AttributeError where the model has no such layer.
    """
    import torch

    captured: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # a frozen network: start the graph here
            output = output.detach().requires_grad_()
        captured.append(output)
        return output.clone()  # what follows may work in place, and the captured map must stay as it is

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            return differentiated_map(model(images).logits, captured[-1], classes, relu, create_graph)
    finally:
        handle.remove()


def overlay(image: np.ndarray, heat: np.ndarray, peak: float) -> np.ndarray:
    """The map over the image, as uint8 (H, W, 3) RGB.

    image uint8 (H, W, 3) RGB; heat (h, w) >= 0; ``peak`` is the value drawn in the strongest colour: pass one peak
    for all maps that are to be compared, since a map stretched for itself always looks strong.
    """
    import numpy as np

    cv2 = import_opencv()
    height, width = image.shape[:2]
    scaled = np.clip(heat / peak, 0, 1) if peak > 0 else np.zeros_like(heat)
    grown = cv2.resize(scaled.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap((grown * 255).round().astype(np.uint8), cv2.COLORMAP_JET)
    return cv2.addWeighted(cv2.cvtColor(colours, cv2.COLOR_BGR2RGB), 0.45, image, 0.55, 0)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    from settings import read_settings, require_folder

    settings = read_settings("gradcam", argv)
    output = Path(settings.output)
    require_folder("--output", output.parent)
    with settings.naming("output"):
        if output.is_dir():
            raise InputError(f"{output} is a folder; the name of a PNG file is needed")
        for name in ("checkpoint", "image"):
            if output.resolve() == Path(getattr(settings, name)).resolve():
                raise InputError(f"{output} is the --{name} itself and would be replaced; take another name")

    import torch

    from checkpoint import load, make_folder, restore_model, write_atomically
    from data import to_input
    from imagefiles import decode_image
    from readout import use

    with settings.naming("checkpoint"):
        checkpoint = load(settings.checkpoint)
        model = restore_model(checkpoint).eval()
        model, checkpoint = use(model, checkpoint, settings.readout)
    names = checkpoint["class_names"]
    with settings.naming("image"):
        pixels = decode_image(settings.image, checkpoint["image_size"])
    images = to_input(torch.from_numpy(pixels)[None], checkpoint["mean"], checkpoint["std"])
    layers: list[str] = []  # those that make a feature map

    def note(name: str, output: Any) -> None:
        if getattr(output, "ndim", 0) == 4 and output.shape[2] == output.shape[3]:  # some have the channels last
            layers.append(name)

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: note(name, output))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        answer = int(model(images).logits.argmax(1))
    for hook in hooks:
        hook.remove()
    if settings.class_name is not None and settings.class_name not in names:
        raise InputError(f"--class-name {settings.class_name}: the checkpoint knows {', '.join(names)}")
    shown = answer if settings.class_name is None else names.index(settings.class_name)
    layer: str = settings.layer or model.last_layer
    if layer not in layers:
        raise InputError(
            f"--layer {layer} makes no feature map; for example {', '.join(layers[:4])}, {model.last_layer}"
        )
    heat = autograd_map(model, images, torch.tensor([shown]), layer)[0].numpy()
    picture = overlay(pixels.transpose(1, 2, 0), heat, heat.max())
    cv2 = import_opencv()
    _, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    make_folder(output.parent)
    write_atomically(output, encoded.tobytes())
    print(f"answer ({checkpoint['readout']}): {names[answer]}; the map of {names[shown]} at {layer} is in {output}")


if __name__ == "__main__":
    sys.exit(main())
