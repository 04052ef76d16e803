"""Networks that stay whole: torchvision's ViT, those of timm, and a user's own. They are cut where they answer alone.

The last linear layer is taken out and becomes ``fc``. What the network makes of images is seen on its way, as a map:

    what is pooled                            the map
    a feature map                             the feature map
    all tokens but the first ones             those tokens, on their grid
    a class token, which answers alone        the tokens that enter the last block: behind its attention their
                                              gradient is exactly zero
"""

from __future__ import annotations

import contextlib
import math
import threading
from typing import Any

import torch
from lwm.models.network import Network, Output, stages_of
from torch import Tensor, nn

from lwm.runtime.errors import InputError

NO_MAP = "no map that its answer depends on is found"
LIKE = 1e-4  # of the largest logit: how far the network may be from what it was before the cut


class Whole(Network):
    """``network``, whose method ``before`` makes of images what is seen, and ``after`` of that what ``fc`` sees.

    ``head`` is the layer of it that becomes ``fc``; ``block`` names the last block of a network that is known to answer
    by a class token, and whose ``before`` returns what ``fc`` sees. ``name`` is for errors. With ``compare`` the logits
    have to be those of its ``forward``. Raises InputError for a network that has no map, and for an image size that it
    does not take.
    """

    last_layer = "map"
    folds = False

    def __init__(
        self,
        network: nn.Module,
        head: object,
        name: str,
        image_size: int,
        before: str,
        after: str = "",
        block: str = "",
        compare: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(head, tuple | list):
            raise InputError(f"{name} has {len(head)} last layers, and one is needed")
        self.head_name = next((each for each, module in network.named_modules() if module is head), "")
        if not isinstance(head, nn.Linear) or not self.head_name:
            raise InputError(f"{name} does not end in one linear layer")
        if head.bias is None:
            raise InputError(f"the last layer of {name} has no bias")
        self.network, self.fc, self.map = network, head, nn.Identity()
        self.before, self.after, self.block = before, after, block
        self.closed_form, self.channels_last, self.grid = False, False, (0, 0)
        if head.weight.is_meta:
            network.set_submodule(self.head_name, nn.Identity())
            return
        self.eval()
        images = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                expected = network(images) if compare else None
            network.set_submodule(self.head_name, nn.Identity())
            self._find_map(images, name)
            with torch.no_grad():
                logits = self(images).logits
        except InputError:
            raise
        except Exception as error:  # each network has its own kind for a size that it does not take
            reason = (str(error) or type(error).__name__).splitlines()[0][:150]
            raise InputError(f"{name} does not take images of {image_size} px ({reason})") from error
        if expected is not None and not torch.allclose(logits, expected, atol=LIKE * float(expected.abs().max())):
            raise InputError(f"{name} does more than its {before} and {after} say")
        self.train()

    def forward(self, images: Tensor) -> Output:
        seen: list[Tensor] = []
        with contextlib.ExitStack() as stack:

            def look(tokens: Tensor) -> Tensor:
                """The same, of which the map that is seen is now a part, in a graph if it is to be differentiated."""
                stack.enter_context(self.from_the_map_on(tokens.device))
                tokens = tokens.to(self.fc.weight.dtype)
                seen.append(self.map(self.in_graph(self._map_of(tokens))))
                return self._with_map(tokens, seen[0])

            if self.block:
                # For this call alone: nothing is kept on the network, and calls of other threads pass.
                thread, block = threading.get_ident(), self.network.get_submodule(self.block)

                def enters(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
                    return (look(given[0]), *given[1:]) if threading.get_ident() == thread else given

                stack.enter_context(block.register_forward_pre_hook(enters))
                pooled = self._after(self._before(images))
            else:
                pooled = self._after(look(self._before(images)))
            return Output(self.fc(pooled), seen[0], self.fc.weight if self.closed_form else None, pooled)

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        return stages_of(self.network)

    def from_original(self, name: str) -> str:
        """The name here of what the network itself calls ``name``."""
        layer, _, kind = name.rpartition(".")
        return f"fc.{kind}" if layer == self.head_name else f"network.{name}"

    def _before(self, images: Tensor) -> Tensor:
        return getattr(self.network, self.before)(images)

    def _after(self, tokens: Tensor) -> Tensor:
        return getattr(self.network, self.after)(tokens) if self.after else tokens

    def _map_of(self, tokens: Tensor) -> Tensor:
        """(B, C, h, w) of feature maps (B, C, h, w), of such with the channels last, or of tokens (B, n, C)."""
        if tokens.dim() == 4:
            return tokens.permute(0, 3, 1, 2) if self.channels_last else tokens
        return tokens[:, -math.prod(self.grid) :].mT.unflatten(2, self.grid)

    def _with_map(self, tokens: Tensor, features: Tensor) -> Tensor:
        """What ``_map_of`` takes the map from, with ``features`` in its place."""
        if tokens.dim() == 4:
            features = features if self.closed_form else features.clone()  # what follows may work in place
            return features.permute(0, 2, 3, 1) if self.channels_last else features
        return torch.cat([tokens[:, : -math.prod(self.grid)], features.flatten(2).mT], 1)

    def _find_map(self, images: Tensor, name: str) -> None:
        """Where the map is, of what shape, and whether it has a closed form. Raises InputError if it has none."""
        with torch.no_grad():
            tokens = self._before(images)
        if not self.block:
            if tokens.dim() not in (3, 4):
                raise InputError(f"{name} makes neither a feature map nor tokens")
            self._set_shape(tokens, name)
            if self._gradient(tokens) is None:  # the class token alone answers
                blocks = getattr(self.network, "blocks", None)
                if tokens.dim() == 4 or not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
                    raise InputError(f"{name}: {NO_MAP}")
                self.block = f"blocks.{len(blocks) - 1}"
        if self.block:
            entering: list[Tensor] = []
            block = self.network.get_submodule(self.block)
            with torch.no_grad(), block.register_forward_pre_hook(lambda _, given: entering.append(given[0])):
                self._before(images)
            self._set_shape(entering[0], name)
        output = self(images)
        if output.pooled.shape != (1, self.fc.in_features):
            raise InputError(f"what the last layer of {name} sees is not a row for each image")
        (gradient,) = torch.autograd.grad(_mixed(output.pooled), output.features, allow_unused=True)
        if gradient is None or not gradient.any():
            raise InputError(f"{name}: {NO_MAP}")

    def _set_shape(self, tokens: Tensor, name: str) -> None:
        if tokens.dim() == 4:
            self.channels_last = getattr(self.network, "output_fmt", "") == "NHWC"
            return
        count = tokens.shape[1]
        known = getattr(self.network, "num_prefix_tokens", None)
        if count == 1:
            raise InputError(f"{name} makes one token alone, which is no map")
        for prefix in (0, 1) if known is None else dict.fromkeys((known, 0, 1)):
            side = math.isqrt(max(count - prefix, 0))
            if side and side**2 == count - prefix:
                self.grid = (side, side)
                return
        raise InputError(f"the {count} tokens of {name} are no square map")

    def _gradient(self, tokens: Tensor) -> Tensor | None:
        """Of what ``fc`` sees in the map of ``tokens``, None if it is zero; sets ``closed_form`` on the way."""
        features = self._map_of(tokens).detach()
        pooled = self._after(self._with_map(tokens, features))
        if pooled.shape == features.shape[:2] and not pooled.requires_grad:  # no parameter takes part
            self.closed_form = torch.allclose(pooled, features.mean((2, 3)), rtol=1e-4, atol=1e-6)
        features.requires_grad_()
        mixed = _mixed(self._after(self._with_map(tokens, features.clone())))
        if not mixed.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(mixed, features, allow_unused=True)
        return gradient if gradient is not None and gradient.any() else None


def _mixed(pooled: Tensor) -> Tensor:
    """A sum in which no normalisation is without a gradient, as it is in the plain sum."""
    return (pooled * torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))).sum()
