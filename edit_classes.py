"""Rename, merge or remove classes of a model, without an image: its head, statistics and history follow.

    python3 edit_classes.py runs/first/student_model.pth --rename 0=zero --merge 2,3=curly --remove 1

Writes runs/first/student_model_edited.pth. First classes are renamed, then merged, then removed, each by the name that
it has by then. A flag may be given several times. Files exported before do not follow: export the model again.
"""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from pathlib import Path

from lwm import editing
from lwm.runtime import checkpoint as checkpoints
from lwm.runtime.errors import InputError, listed, log, one_line_errors
from lwm.runtime.files import make_folder, require_folder
from lwm.runtime.setting_types import check_names
from lwm.runtime.settings import OneLineParser


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    path = os.path.expanduser
    parser.add_argument("checkpoint", type=path, help="any checkpoint of this project")
    parser.add_argument("--rename", action="append", default=[], metavar="NAME=NEW", help="a class's new name")
    parser.add_argument(
        "--merge", action="append", default=[], metavar="A,B=NAME", help="one class in place of several"
    )
    parser.add_argument("--remove", action="append", default=[], metavar="A,B", help="classes that are to go")
    parser.add_argument("--output", type=path, help="the checkpoint to write (default: beside it, _edited)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    options = parser.parse_args(argv)
    if not (options.rename or options.merge or options.remove):
        raise InputError("nothing to do: give --rename, --merge or --remove")
    source = Path(options.checkpoint)
    output = Path(options.output) if options.output else source.parent / f"{source.stem}_edited{source.suffix}"
    require_folder("--output", output.parent)
    if output.exists() and (not options.overwrite or output.resolve() == source.resolve()):
        raise InputError(f"{output} exists; take another --output, or replace an earlier edit with --overwrite")

    before = checkpoint = checkpoints.load(source)
    if not checkpoint["finished"]:
        raise InputError(f"{source}: its training is not finished; go on with --resume first")
    for edit in options.rename:
        name, to = halves("--rename", edit, "cat=tomcat")
        checkpoint = editing.rename(checkpoint, name, to)
    for edit in options.merge:
        names, to = halves("--merge", edit, "lorry,truck=lorry")
        checkpoint = editing.merge(checkpoint, split(names, checkpoint["class_names"]), to)
    for edit in options.remove:
        checkpoint = editing.remove(checkpoint, split(edit, checkpoint["class_names"]))

    make_folder(output.parent)
    checkpoints.save(output, checkpoint)
    names = checkpoint["class_names"]
    if moved := [f"{name} {number}" for number, name in enumerate(names) if before["class_names"][number] != name]:
        log.info(f"outputs have other numbers or names now: {listed(moved)}")
    if options.remove:
        log.info("what the weights learned from images of removed classes stays in them")
    log.info("test images are found by the names of their folders: rename, merge or remove these too")
    print(f"{output}: {len(names)} classes, {listed(names)}")


def halves(flag: str, edit: str, example: str) -> tuple[str, str]:
    """What stands before the last "=", and the new name after it. Raises InputError."""
    names, _, to = edit.rpartition("=")
    try:
        (to,), (names,) = check_names([to.strip()]), check_names([names.strip()])
        if "," in to:
            raise ValueError("a new name is to have no comma")
    except ValueError as error:
        raise InputError(f"{flag} is {edit!r}: {error}, as in {flag} {example}") from error
    return names, to


def split(names: str, known: list[str]) -> list[str]:
    """Names with commas between them; a class's own name may have some."""
    names = unicodedata.normalize("NFC", names.strip())
    return [names] if names in known else [name.strip() for name in names.split(",")]


if __name__ == "__main__":
    sys.exit(main())
