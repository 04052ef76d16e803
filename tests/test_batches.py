"""Batches, augmentation and normalisation, against crops and mirrors made one by one and against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lwm.images import batches
from lwm.images.batches import batch_order, channel_statistics, to_input


@given(count=st.integers(1, 300), batch_size=st.integers(1, 70), seed=st.integers(0, 99))
def test_batches_cover_each_image_once_in_near_equal_parts(count, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    parts, others = (batch_order(torch.zeros(count), batch_size, generator) for _ in range(2))
    sizes = [len(part) for part in parts]
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == int(np.ceil(count / batch_size))
    assert count < 20 or not torch.equal(torch.cat(parts), torch.cat(others))


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Images without a black pixel and without two equal crops."""
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 256, (count, 3, height, width), dtype=np.uint8))


def crops(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    """Each crop of an image (3, H, W) padded with black by an eighth of its width, and each mirrored crop."""
    _, height, width = image.shape
    padding = width // 8
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            found[crop.tobytes()] = (top, left, False)
            found[np.ascontiguousarray(crop[:, :, ::-1]).tobytes()] = (top, left, True)
    return found


def augmented(pixels: torch.Tensor, flip: bool, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return batches.augment(pixels, batches.draw_augmentation(len(pixels), pixels.shape[-1], flip, generator))


sides = st.integers(8, 20)


@given(count=st.integers(1, 6), height=sides, width=sides, flip=st.booleans(), seed=st.integers(0, 999))
def test_augment_only_shifts_and_mirrors(count, height, width, flip, seed):
    pixels = noise(count, height, width, seed)
    out = augmented(pixels, flip, seed)
    assert (out.shape, out.dtype) == (pixels.shape, torch.uint8)
    moves = [crops(one.numpy())[other.contiguous().numpy().tobytes()] for one, other in zip(pixels, out, strict=True)]
    assert flip or not any(mirrored for _, _, mirrored in moves)


def test_augment_uses_every_shift_and_both_sides_about_equally_and_without_regard_to_each_other():
    pixels = noise(1, 16, 16)
    moves, out = crops(pixels[0].numpy()), augmented(pixels.expand(3000, -1, -1, -1), True, 0)
    done = [moves[image.contiguous().numpy().tobytes()] for image in out]
    counts = {move: done.count(move) for move in set(done)}
    assert len(counts) == 5 * 5 * 2
    assert all(14 < count < 106 for count in counts.values())  # six standard deviations round 60


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augment_is_fixed_by_its_generator_and_gives_the_channels_last_layout(layout):
    pixels = noise(8, 16, 16).contiguous(memory_format=layout)
    out, again, other = (augmented(pixels, True, seed) for seed in (5, 5, 6))
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    assert torch.equal(pixels, noise(8, 16, 16))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert to_input(out, [0.5] * 3, [0.2] * 3).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("levels", [(0, 256), (51, 52)])  # of plain images the deviation is 0, but is divided by
def test_channel_statistics_and_to_input_against_numpy(levels):
    pixels = np.random.default_rng(0).integers(*levels, (1100, 3, 5, 6), dtype=np.uint8)
    mean, std = channel_statistics(torch.from_numpy(pixels))
    assert all(type(value) is float for value in mean + std)  # they go into the checkpoint
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, np.maximum((pixels / 255).std((0, 2, 3)), 1e-3), rtol=1e-9)
    inputs = to_input(torch.from_numpy(pixels), mean, std)
    expected = (pixels / 255 - np.array(mean).reshape(3, 1, 1)) / np.array(std).reshape(3, 1, 1)
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-4)
