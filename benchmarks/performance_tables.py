"""The tables of docs/performance.md, from the JSONs of results/performance: python3 benchmarks/performance_tables.py"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results" / "performance"


def main() -> None:
    print("\n\n".join([steps(), levers(), data(), estimate()]))


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(rows: list[list[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def steps() -> str:
    rows = []
    for model, precision in (("resnet32", "fp32"), ("resnet32", "bf16"), ("resnet18", "fp32"), ("resnet18", "bf16")):
        figures = read(f"{model}-{precision}")
        network = f"{model.replace('resnet', 'ResNet-')}, {precision}"
        for method, memory in figures["memory_ratio"].items():
            first, third = figures["ratio_quartiles"][method]
            spread = "" if method == "finetune" else f"{first:.2f} to {third:.2f}"
            speed = round(figures["images_per_second"][method])
            rows.append([network, method, f"{figures['ratio'][method]:.2f}", spread, speed, f"{memory:.2f}"])
        rows.append([network, "floor", f"{figures['floor']:.2f}", "", "", ""])
    return table(rows)


def levers() -> str:
    kept = {"batch-norm not folded": "folded", "contiguous layout": "channels-last kept", "fine-tuning": ""}
    both = [read(f"levers-resnet32-{precision}")["to_the_step_as_it_is"] for precision in ("fp32", "bf16")]

    def shown(figure: dict) -> str:
        return f"{figure['median']:.2f} ({' to '.join(f'{q:.2f}' for q in figure['quartiles'])})"

    names = [name for name in both[0] if name != "as it is"]
    return table([[name, *(shown(one[name]) for one in both), kept.get(name, "lost")] for name in names])


def data() -> str:
    rows = []
    for name in ("data-32px", "data-84px"):
        for row in read(name)["rows"]:
            epochs = " and ".join(f"{seconds:.1f}" for seconds in row["epoch_seconds"])
            first = f"{row['first_epoch_with_decoding_to_second']:.2f}"
            times = [row["decode_seconds"], row["open_seconds"], row["cache_mb"], row["private_mb_of_the_images"]]
            rows.append([row["px"], f"{row['images']:,}", *times, epochs, first, row["private_mb_after_training"]])
    return table(rows)


def estimate() -> str:
    rows = []
    for row in read("estimate")["estimated"]:
        reduce = f"{row['all_reduce_ms']:.1f} ({row['all_reduce_not_hidden_ms']:.1f})"
        times = [f"{row[name]:.1f}" for name in ("sync_batch_norm_ms", "reading_ms", "step_ms")]
        rows.append([row["gpus"], f"{row['compute_ms']:.1f}", reduce, *times, f"{row['epoch_minutes']:.1f}"])
        rows[-1].append(row["largest_part"])
    return table(rows)


if __name__ == "__main__":
    main()
