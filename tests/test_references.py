"""What the documents refer to exists: flags, files, headings, functions."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

from lwm.runtime.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
TORCHRUN = {"--nproc_per_node", "--nnodes", "--standalone", "--rdzv_backend", "--rdzv_endpoint"}


def test_every_flag_that_the_documents_name_exists():
    known = (
        {f"--{no}{f.name.replace('_', '-')}" for f in fields(Settings) for no in ("", "no-")} | {"--help"} | TORCHRUN
    )
    for script in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("lwm/experiments/*.py")]:
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', script.read_text()))
    text = "".join(path.read_text() for path in PAGES if path.name != "CHANGELOG.md")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text))
    assert named
    assert named <= known


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere_and_every_module_and_function_exists(path):
    text = path.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        aim = path.parent / target if target else path
        assert aim.exists(), target
        assert not anchor or anchor in anchors(aim), f"{target}#{anchor}"
    for module, name in re.findall(r"`(lwm(?:\.[a-z_]+)*|losses|attention|classifiers|models)\.([A-Za-z_]\w*)", text):
        module = importlib.import_module(module if module.startswith("lwm") else f"lwm.{module}")
        assert name == "py" or hasattr(module, name) or importlib.import_module(f"{module.__name__}.{name}"), name
