"""An ESTIMATE of what an ImageNet-sized step takes on 1, 8, 64 and 512 GPUs, and of what stops it from scaling.

    python3 benchmarks/estimate.py

Measured or counted here: operations an image, bytes of the gradient, batch-norm layers, decoding of a photograph, and
reading a share of a batch from the mapped cache. Assumed, each a flag: what a GPU and the wires between GPUs sustain.
No GPU is asked, so the result is arithmetic and no measurement.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from step_cost import report
from torch.utils.flop_counter import FlopCounterMode

import models
from imagefiles import decode_all

IMAGES, SIZE, CLASSES = 1_281_167, 224, 1000  # ImageNet-1k's training images (Russakovsky et al., IJCV 2015)
FILE = (500, 375)  # px; about their average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1024, help="of all GPUs together (default: 1024)")
    parser.add_argument("--tflops", type=float, default=100, help="that a GPU sustains in training (default: 100)")
    parser.add_argument("--inside", type=float, default=100, help="GB/s between GPUs of a machine (default: 100)")
    parser.add_argument("--between", type=float, default=10, help="GB/s between machines (default: 10)")
    parser.add_argument("--latency", type=float, default=40, help="us of a small all-reduce (default: 40)")
    parser.add_argument("--gpus", type=int, default=8, help="in a machine (default: 8)")
    parser.add_argument("--cores", type=int, default=64, help="in a machine (default: 64)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    parts = measured()
    rows = [row(options, parts, gpus) for gpus in (1, 8, 64, 512)]
    print(json.dumps(report(options, measured_or_counted=parts, estimated=rows), indent=1))


def measured() -> dict[str, float]:
    model = models.build("resnet18", CLASSES, SIZE).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, SIZE, SIZE))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    return {
        "gflop_forward": round(counter.get_total_flops() / 1e9, 2),
        "gradient_mb": round(4e-6 * sum(p.numel() for p in model.parameters()), 1),
        "batch_norms": len(norms),
        "decode_ms_an_image_and_core": round(decoding(), 2),
        "gather_ms_an_image": round(gathering(), 4),
    }


def decoding() -> float:
    noise = np.random.default_rng(0).integers(0, 256, (FILE[1] // 8, FILE[0] // 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(FILE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.jpg"
        path.write_bytes(buffer.getvalue())
        decode_all([path], SIZE, False)
        started = time.perf_counter()
        decode_all([path] * 100, SIZE, False)
        return 1e3 * (time.perf_counter() - started) / 100


def gathering() -> float:
    """Milliseconds of one thread to copy an image out of a mapped file that is in memory."""
    count = 2000
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.memmap(Path(folder) / "pixels", np.uint8, "w+", shape=(count, 3, SIZE, SIZE))
        pixels[:] = 1
        tensor = torch.from_numpy(pixels)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        started = time.perf_counter()
        for part in torch.randperm(count).split(128):
            tensor[part]
        seconds = time.perf_counter() - started
        torch.set_num_threads(threads)
    return 1e3 * seconds / count


def row(options, parts: dict[str, float], gpus: int) -> dict[str, float]:
    """Milliseconds of the parts of a step of lwm on so many GPUs, and what follows from them."""
    machines = -(-gpus // options.gpus)
    own = options.batch_size / gpus
    forward = own * parts["gflop_forward"] / options.tflops  # GFLOP / TFLOPS = ms
    compute = 4 * forward  # the student's forward, a backward of twice that, and the teacher's forward
    wire = options.inside if machines == 1 else options.between
    reduce = 2 * (gpus - 1) / gpus * parts["gradient_mb"] / wire  # a ring; MB / (GB/s) = ms
    exposed = max(0.0, reduce - 2 * forward)  # it overlaps the backward pass
    norms = 0.0 if gpus == 1 else 2 * parts["batch_norms"] * options.latency / 1e3  # forward and backward, one by one
    host = own * parts["gather_ms_an_image"]  # beside the GPU's work: it counts where it is longer
    step = max(compute + exposed + norms, host)
    limits = {"compute": compute, "gradients": exposed, "batch-norm": norms, "reading images": host}
    return {
        "gpus": gpus,
        "images_a_gpu": own,
        "compute_ms": round(compute, 2),
        "all_reduce_ms": round(reduce, 2),
        "all_reduce_not_hidden_ms": round(exposed, 2),
        "sync_batch_norm_ms": round(norms, 2),
        "reading_ms": round(host, 2),
        "step_ms": round(step, 2),
        "epoch_minutes": round(step * IMAGES / options.batch_size / 6e4, 2),
        "decoding_once_minutes": round(parts["decode_ms_an_image_and_core"] * IMAGES / options.cores / 6e4, 1),
        "largest_part": max(limits, key=lambda name: limits[name]),
    }


if __name__ == "__main__":
    main()
