"""What was taught to several models and how well each answers after each task, side by side.

    python3 history.py runs/*/

A folder stands for the student in it, or for the teacher if there is none; a file is a checkpoint. Prints a table
(``--json``: a list for programs) and writes a page, history.html. Nothing is judged anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from lwm.reporting import history
from lwm.runtime.checkpoint import load
from lwm.runtime.errors import InputError, log, one_line_errors
from lwm.runtime.files import make_folder, require_folder
from lwm.runtime.settings import OneLineParser

MODELS = ("student_model.pth", "teacher_model.pth")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    path = os.path.expanduser
    parser.add_argument("runs", nargs="+", type=path, metavar="folder-or-checkpoint")
    parser.add_argument("--output", default="history.html", type=path, help="the page (default: history.html)")
    parser.add_argument("--json", action="store_true", help="a JSON list in place of the table")
    options = parser.parse_args(argv)
    output = Path(options.output)
    if output.suffix != ".html":
        raise InputError(f"--output {output}: a page is written; let the name end in .html")
    require_folder("--output", output.parent)
    paths = [found for run in options.runs if (found := model_of(Path(run)))]
    if not paths:
        raise InputError(f"{options.runs[0]}: there is no {' nor '.join(MODELS)}; name a run's folder, or a checkpoint")
    names = [str(path.parent if path.name in MODELS else path) for path in paths]
    rows = history.rows([history.Run(name, load(path)["tasks"]) for name, path in zip(names, paths, strict=True)])
    make_folder(output.parent)
    history.write_page(output, rows)
    print(json.dumps(rows, indent=1) if options.json else history.table(rows))
    log.info(f"the page is {output}")


def model_of(run: Path) -> Path | None:
    """The model that a folder or a file stands for; None, which is said, for a folder without any."""
    if not run.is_dir():
        return run
    found = next((run / name for name in MODELS if (run / name).is_file()), None)
    if found is None:
        log.info(f"{run} has no model: left out")
    return found


if __name__ == "__main__":
    sys.exit(main())
