"""What a setting may be: each function makes a field of settings.Settings, with its help, how a flag's text becomes a
value ("parse"), and the check that every value must pass ("check", which raises ValueError with what is needed).
"""

from __future__ import annotations

import difflib
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any

# Control characters, ends of lines, and halves of characters.
UNPRINTABLE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def choice(help: str, *choices: str, open: bool = False) -> Any:
    """One of ``choices``. An ``open`` one may have more, of which the script knows: read_settings takes them."""
    check = check_text if open else one_of(choices)
    return field(metadata={"help": help, "parse": str, "check": check, "choices": choices})


def one_of(choices: Iterable[str]) -> Callable[[Any], str]:
    """The check that a value is one of ``choices``."""
    choices = tuple(dict.fromkeys(choices))

    def check(value: Any) -> str:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"one of {', '.join(choices)} is needed{hint}")
        return value

    return check


def number(help: str, kind: type, least: float, most: float = math.inf, above: bool = False) -> Any:
    noun = "a whole number" if kind is int else "a number"
    bounds = f"above {least}" if above else f"of at least {least}"
    bounds += f" and at most {most}" if most < math.inf else ""

    def check(value: Any) -> int | float:
        allowed = int if kind is int else int | float
        if not isinstance(value, allowed) or isinstance(value, bool) or value != value:
            raise ValueError(f"{noun} is needed")
        try:
            number = kind(value)
        except OverflowError:
            number = math.inf
        if number < least or (above and number == least) or number > most or number == math.inf:
            raise ValueError(f"{noun} {bounds} is needed")
        return number

    return field(metadata={"help": help, "parse": kind, "check": check})


def channels(help: str, least: float) -> Any:
    def parse(text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    def check(value: Any) -> tuple[float, ...]:
        numbers = value if isinstance(value, list | tuple) else []
        good = all(isinstance(x, int | float) and not isinstance(x, bool) and least <= x <= 1000 for x in numbers)
        if len(numbers) != 3 or not good:
            raise ValueError(f"three numbers of at least {least}, red, green and blue, are needed, as in 0.5,0.5,0.5")
        return tuple(map(float, numbers))

    return field(metadata={"help": f"{help}, comma-separated", "parse": parse, "check": check})


def names(help: str) -> Any:
    def parse(text: str) -> list[str]:
        return [name.strip() for name in text.split(",")]

    return field(metadata={"help": f"{help}, comma-separated", "parse": parse, "check": check_names})


def check_names(value: Any) -> tuple[str, ...]:
    """The names in Unicode's composed form, in which the same letters are the same text."""
    given = value if isinstance(value, list | tuple) else []
    if not given or not all(isinstance(name, str) and name for name in given):
        raise ValueError("a list of class names is needed, such as ['apple', 'baby'] (apple,baby as a flag)")
    odd = [name for name in given if UNPRINTABLE.search(name)]
    if odd:
        raise ValueError(f"the class name {odd[0]!a} has characters that cannot be printed")
    names = tuple(unicodedata.normalize("NFC", name) for name in given)
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"class {twice[0]!r} is named twice")
    return names


def check_text(value: Any) -> str:
    if not isinstance(value, str) or not value or re.search("[\0\ud800-\udfff]", value):
        raise ValueError("a text that is not empty, and of characters that UTF-8 has, is needed")
    return value


def check_path(value: Any) -> str:
    return os.path.expanduser(check_text(value))  # no shell does it in config.py, nor in --flag=~/folder


def text(help: str) -> Any:
    return field(metadata={"help": help, "parse": str, "check": check_text})


def folder(help: str) -> Any:
    return field(metadata={"help": help, "parse": str, "check": check_path})


def file(help: str, default: str = "") -> Any:
    """A path that the command line alone may name; without it there is ``default``."""
    return field(default=default, metadata={"help": help, "file": check_path})


def part(help: str, alone: str | None = None) -> Any:
    """The name of a part of such a file, or None; ``alone`` is meant by the flag without a value."""
    return field(default=None, metadata={"help": help, "file": check_text, "alone": alone})


def switch(help: str) -> Any:
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("True or False is needed")
        return value

    return field(metadata={"help": help, "parse": bool, "check": check})


def device(help: str) -> Any:
    def check(value: Any) -> str:
        # As torch reads it, which takes no leading zero and wraps around after 127.
        if not re.fullmatch("auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?", str(value)):
            raise ValueError("auto, cpu, mps, cuda or cuda:N is needed")
        return value

    return field(metadata={"help": help, "parse": str, "check": check})
