"""What each lever is worth: a step of lwm as the scripts take it, against the same step with one thing done otherwise.

    python3 benchmarks/levers.py --model resnet32 --precision bf16 --json levers.json

All levers but one are interleaved in one run, and ratios are of one round. Freed memory that the process keeps cannot
be given up again: steps without it are measured before the others, against fine-tuning.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from step_cost import arguments, interleaved, quartiles, report, step_of

from lwm.runtime import hardware


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: 15)")
    options = parser.parse_args()
    options.compile = False
    pair = {method: step_of(options, method) for method in ("finetune", "lwm")}
    given_back = interleaved(pair, options.repeats)
    hardware.keep_freed_memory()
    cases = {
        "as it is": pair["lwm"],
        "fine-tuning": pair["finetune"],
        "batch-norm not folded": step_of(options, "lwm", fold=False),
        "contiguous layout": step_of(options, "lwm", layout=torch.contiguous_format),
        "teacher in inference_mode": step_of(options, "lwm", inference_mode=True),
        "fused SGD": step_of(options, "lwm", fused=True),
        "foreach SGD": step_of(options, "lwm", foreach=True),
    }
    compiled = copy.copy(options)
    compiled.compile = True
    cases["torch.compile"] = step_of(compiled, "lwm")
    started = time.perf_counter()
    cases["torch.compile"]()
    compile_seconds = time.perf_counter() - started
    kept = interleaved(cases, options.repeats)
    base = kept["as it is"]
    figures = report(
        options,
        lwm_to_finetuning={
            "freed memory given back": ratio(given_back["lwm"], given_back["finetune"]),
            "freed memory kept": ratio(base, kept["fine-tuning"]),
        },
        to_the_step_as_it_is={name: ratio(seconds, base) for name, seconds in kept.items()},
        compile_seconds=round(compile_seconds, 1),
    )
    print(json.dumps(figures, indent=1))


def ratio(seconds: list[float], base: list[float]) -> dict[str, object]:
    """Median and quartiles over the rounds."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return {"median": round(statistics.median(ratios), 3), "quartiles": [round(q, 3) for q in quartiles(ratios)]}


if __name__ == "__main__":
    main()
