"""The table of docs/performance.md on what a step costs: python3 benchmarks/performance_tables.py makes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lwm.experiments.tables import ROOT, markdown, publish

RESULTS = ROOT / "results" / "performance"


def steps() -> str:
    """In fine-tuning steps; the JSONs have the quartiles."""
    rows = []
    for model, precision in (("resnet32", "fp32"), ("resnet32", "bf16"), ("resnet18", "fp32"), ("resnet18", "bf16")):
        figures = json.loads((RESULTS / f"{model}-{precision}.json").read_text())
        ratio = figures["ratio"]
        rows.append(
            {
                "network": f"{model.replace('resnet', 'ResNet-')}, {precision}",
                **{method: f"{ratio[method]:.2f}" for method in ("lwf", "lwf-mc", "lwm")},
                "lwm by autograd": f"{ratio['lwm-autograd']:.2f}",
                "floor": f"{figures['floor']:.2f}",
                "lwm, images/s": round(figures["images_per_second"]["lwm"]),
                "lwm, peak memory": f"{figures['memory_ratio']['lwm']:.2f}",
            }
        )
    return markdown(rows)


if __name__ == "__main__":
    publish({RESULTS / "steps.md": steps()})
