"""Which module imports which: no circle, few floors, and nothing from above."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = 8


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(("lwm", *parts) if parts[0] == "models" else parts)
    return name.removesuffix(".__init__")


FILES = {name_of(p): p for pattern in ("*.py", "lwm/**/*.py", "models/**/*.py") for p in ROOT.glob(pattern)}
SCRIPTS = {name for name in FILES if "." not in name} - {"config", "lwm"}


def imports(source: str) -> set[str]:
    """The modules of the project that are named in any import: inside a function and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not followed"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {"lwm.api" if name == "lwm.Classifier" else name for name in inside} & FILES.keys()
            names |= inside or {str(node.module)}
    return names & (FILES.keys() - {"lwm"})  # which holds the version, and a name of lwm.api


GRAPH = {name: imports(path.read_text()) for name, path in FILES.items()}


def chain_of(graph: dict[str, set[str]], name: str) -> list[str]:
    """The longest chain of imports from ``name`` down. Raises AssertionError if it bites its own tail."""

    @functools.cache
    def below(name: str) -> list[str]:
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        above.append(name)
        chains = [below(other) for other in sorted(graph[name])]
        above.pop()
        return [name, *max(chains, key=len, default=[])]

    above: list[str] = []
    return below(name)


def test_imports_have_no_circle_and_few_floors():
    for name in GRAPH:
        chain = chain_of(GRAPH, name)
        assert len(chain) <= FLOORS, " -> ".join(chain)


def test_a_circle_and_hidden_imports_are_found():
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lwm.losses import lwm\n"
    assert imports(hidden + "def f():\n    import demo, json\n    from lwm import models\n") == {
        "lwm.losses",
        "demo",
        "lwm.models",
    }
    with pytest.raises(AssertionError, match="a -> b -> a"):
        chain_of({"a": {"b"}, "b": {"a"}}, "a")


def room_of(name: str) -> str:
    """The script's, or the method's in lwm itself, or that of a package such as lwm.images."""
    if name in SCRIPTS | {"config"}:
        return "scripts" if name in SCRIPTS else name
    room = name.split(".")[1]
    return "method" if f"lwm.{room}" in FILES and FILES[f"lwm.{room}"].name != "__init__.py" else room


def test_no_room_imports_from_above():
    above = ["scripts", "experiments", "reporting", "method", "images", "models"]
    rank = {room: number for number, room in enumerate(above)} | {"runtime": len(above) - 1}
    assert {room_of(name) for name in GRAPH if name != "lwm"} == {*rank, "config"}
    edges = [(name, other) for name, others in GRAPH.items() if name != "lwm" for other in others]
    assert not [edge for edge in edges if edge[1] != "config" and rank[room_of(edge[0])] > rank[room_of(edge[1])]]
    # Only settings and scripts know the page; networks know errors alone.
    assert {name for name, other in edges if other == "config"} <= SCRIPTS | {"lwm.runtime.settings"}
    below = {other for name, other in edges if room_of(name) == "models" and room_of(other) != "models"}
    assert below == {"lwm.runtime.errors"}
    own = {"config", *(f"lwm.runtime.{name}" for name in ("setting_types", "recommended", "errors"))}
    assert GRAPH["lwm.runtime.settings"] == own
    assert not GRAPH["config"]
    assert GRAPH["lwm"] == {"lwm.api"}
