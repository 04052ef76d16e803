"""Batches and augmentation, against crops and mirrors made one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lwm.images import batches, datasets


@given(count=st.integers(1, 300), batch_size=st.integers(1, 70), seed=st.integers(0, 99))
def test_batches_cover_each_image_once_in_near_equal_parts(count, batch_size, seed):
    parts = batches.batches(torch.zeros(count), batch_size, torch.Generator().manual_seed(seed))
    sizes = [len(part) for part in parts]
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == int(np.ceil(count / batch_size))
    again = batches.batches(torch.zeros(count), batch_size, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_batches_are_shuffled_anew_each_time():
    generator = torch.Generator().manual_seed(0)
    orders = [torch.cat(batches.batches(torch.zeros(100), 32, generator)).tolist() for _ in range(2)]
    assert orders[0] != orders[1]
    assert list(range(100)) not in orders


# Augmentation -------------------------------------------------------------------------------------------------------


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


def moves(pixels: torch.Tensor, flip: bool, seed: int = 0) -> list[tuple[int, int, bool]]:
    """What augment did to each image; a KeyError where it did something else."""
    out = augmented(pixels, flip, seed)
    assert out.shape == pixels.shape
    assert out.dtype == torch.uint8
    return [
        crops(before.numpy())[after.contiguous().numpy().tobytes()] for before, after in zip(pixels, out, strict=True)
    ]


@given(
    count=st.integers(1, 6),
    height=st.integers(8, 20),
    width=st.integers(8, 20),
    flip=st.booleans(),
    seed=st.integers(0, 999),
)
def test_augment_only_shifts_and_mirrors(count, height, width, flip, seed):
    done = moves(noise(count, height, width, seed), flip, seed)
    assert flip or not any(mirrored for _, _, mirrored in done)


def test_augment_uses_every_shift_and_both_sides_about_equally_and_without_regard_to_each_other():
    done = moves(noise(1, 16, 16).expand(3000, -1, -1, -1), True)
    counts = {move: done.count(move) for move in set(done)}
    assert len(counts) == 5 * 5 * 2
    # 60 expected of each; six standard deviations are 46.
    assert all(14 < count < 106 for count in counts.values())


def test_augment_without_flip_never_mirrors():
    assert not any(mirrored for _, _, mirrored in moves(noise(1, 16, 16).expand(500, -1, -1, -1), False))


def test_each_image_of_a_batch_moves_for_itself():
    assert len(set(moves(noise(40, 32, 32), True))) > 20


def test_augment_is_fixed_by_its_generator_and_by_nothing_else():
    pixels = noise(8, 16, 16)
    outs = []
    for seed, state in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(state)
        outs.append(augmented(pixels, True, seed))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augment_gives_the_channels_last_layout_and_leaves_its_input(layout):
    pixels = noise(4, 16, 16).contiguous(memory_format=layout)
    before = pixels.clone()
    out = augmented(pixels, True, 0)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert datasets.to_input(out, [0.5] * 3, [0.2] * 3).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels, before)
