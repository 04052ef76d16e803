"""Who imports whom: one way, no cycle, and one way in for the settings."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in ROOT.glob("*.py")} | {"models": ROOT / "models" / "__init__.py"}
SCRIPTS = {"train_teacher_model", "incremental_learning_system", "demo", "export", "predict", "reproduce", "field"}


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports, inside functions too, but not for type checking alone."""
    nodes, names = [ast.parse(path.read_text())], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)
    return names & MODULES.keys()


IMPORTS = {name: imported(path) - {name} for name, path in MODULES.items()}  # models is a folder


def test_no_module_imports_itself_by_way_of_others():
    reached = dict(IMPORTS)
    for _ in MODULES:
        reached = {name: found.union(*(reached[each] for each in found)) for name, found in reached.items()}
    assert [name for name, found in reached.items() if name in found] == []


def test_only_settings_knows_the_page():
    assert [name for name, found in IMPORTS.items() if "config" in found] == ["settings"]


def test_no_module_imports_a_script_but_scripts():
    """gradcam.py is a module too; field.py reads what reproduce.py has left."""
    for name, found in IMPORTS.items():
        assert name in SCRIPTS or not found & SCRIPTS, name
