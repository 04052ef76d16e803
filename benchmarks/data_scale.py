"""Time and private memory against the number of images of a folder, each count in a process of its own.

    python3 benchmarks/data_scale.py photos32 --counts 1000,10000,50000 --json data_scale.json

Each process decodes the training images of as many classes as give the count (into a new cache, then again from it),
trains ResNet-32 on them for two epochs with the scripts' loop, and says what memory is its own: RssAnon of
/proc/self/status, which leaves out the mapped file that the system may drop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train/<class>/ in it")
    parser.add_argument("--counts", default="1000,10000,50000")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        print(json.dumps(measure(options)))
        return
    from lwm.runtime.hardware import machine

    rows = []
    for count in options.counts.split(","):
        command = [sys.executable, *sys.argv, "--count", count]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if options.json:
        command = f"python3 benchmarks/data_scale.py {options.folder.name} {' '.join(sys.argv[2:])}".strip()
        options.json.write_text(json.dumps({"command": command, "rows": rows, **machine()}, indent=1) + "\n")


def measure(options) -> dict:
    import torch
    from epoch_overhead import OF_A_RUN, SETTINGS, epochs_of_scripts
    from step_cost import resident

    from lwm import losses, models
    from lwm.images.datasets import Place, open_source
    from lwm.runtime import hardware

    def private_memory() -> float:
        return resident("RssAnon") * 2**20 / 1e6

    hardware.keep_freed_memory()
    row = {"images": 0, "px": options.image_size}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        place, cache = Place("folder", str(options.folder)), Path(folder) / "cache"
        source = open_source(place, options.image_size, cache_dir=cache)
        names = source.classes["train"]
        a_class = len(source.listing("train", names[0]))
        chosen = names[: max(2, options.count // a_class)]
        before = private_memory()
        for what in ("decode_seconds", "open_seconds"):
            started = time.perf_counter()
            train = source.train(chosen, chosen)
            row[what] = round(time.perf_counter() - started, 2)
        row["images"] = len(train.labels)
        row["cache_mb"] = round(train.pixels.numel() / 1e6, 1)
        row["private_mb_of_the_images"] = round(private_memory() - before, 1)
        settings = types.SimpleNamespace(**SETTINGS, **OF_A_RUN, batch_size=128, precision=options.precision)
        model = hardware.to_device(models.build("resnet32", len(chosen), options.image_size), torch.device("cpu"))
        log = epochs_of_scripts(2, model, train, losses.classify, settings)
        row["epoch_seconds"] = [round(row["images"] / epoch["images_per_second"], 2) for epoch in log]
        first = row["decode_seconds"] + row["epoch_seconds"][0]
        row["first_epoch_with_decoding_to_second"] = round(first / row["epoch_seconds"][1], 3)
        row["private_mb_after_training"] = round(private_memory(), 1)
    return row


if __name__ == "__main__":
    main()
