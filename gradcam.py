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

from lwm.runtime.errors import InputError, import_opencv, one_line_errors

if TYPE_CHECKING:  # torch is imported where it is used: --help answers at once
    import numpy as np


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
    from lwm.runtime.settings import read_settings, require_folder

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

    from lwm.attention import autograd_map
    from lwm.classifiers import use
    from lwm.images.datasets import to_input
    from lwm.images.files import decode_image
    from lwm.runtime.checkpoint import load, make_folder, restore_model, write_atomically

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
