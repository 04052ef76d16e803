"""Is gamma above 0 worth it? The table of that, from the CSVs of all protocols that have both with all else equal.

    python3 -m lwm.experiments.gamma

Nothing is trained. docs/results.md shows the table.
"""

from __future__ import annotations

import sys

from lwm.experiments import tables
from lwm.experiments.protocols import PROTOCOLS
from lwm.runtime.errors import one_line_errors

RESULTS = tables.ROOT / "results" / "gamma"
# Protocol, its CSV, what has gamma 0.1 and what has 0. The methods of the protocols on digits have one beta.
METHODS = ("accuracy", "lwm", "lwf-mc")
BINARY = ("ablation", "binary gamma=0.1", "binary gamma=0")
SOFTMAX = ("ablation", "softmax gamma=0.1", "softmax gamma=0")
COMPARED = {
    "digits, 2 + 2": ("digits-2+2", *METHODS),
    "digits, 5 tasks of 2": ("digits-5x2", *METHODS),
    "digits, 5 tasks of 2, softmax form": ("digits-5x2", *SOFTMAX),
    "photos, 10 + 10": ("photos32-10+10", *BINARY),
    "photos, 10 + 10, softmax form": ("photos32-10+10", *SOFTMAX),
    "photos, 5 tasks of 4": ("photos32-5x4", *BINARY),
    "photos, 5 tasks of 4, softmax form": ("photos32-5x4", *SOFTMAX),
}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    tables.publish({RESULTS / "table.md": table()})


def table() -> str:
    """Accuracies after the last task, in pairs by seed."""
    lines = []
    for name, (protocol, csv, *pair) in COMPARED.items():
        rows = tables.read_rows(tables.ROOT / "results" / protocol / f"{csv}.csv")
        above, zero = (tables.finished(rows, method, len(PROTOCOLS[protocol].groups)) for method in pair)
        columns = ("accuracy", "accuracy_old", "accuracy_new")
        cells = {tables.MEASURES[column]: tables.paired(above[column], zero[column]) for column in columns}
        lines.append({"protocol": name, **cells, "seeds": len(above.index.intersection(zero.index))})
    return tables.markdown(lines)


if __name__ == "__main__":
    sys.exit(main())
