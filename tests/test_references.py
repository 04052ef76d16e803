"""What the documents refer to exists: flags, files, headings, functions."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from lwm.runtime import settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_flag_and_constant_that_the_documents_name_exists():
    known = {"--" + f.name.replace("_", "-") for f in fields(settings.Settings)}
    known |= {f"--no-{f.name.replace('_', '-')}" for f in fields(settings.Settings)}
    known |= {"--help"}
    known |= {"--nproc_per_node", "--nnodes", "--standalone", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
    for script in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', script.read_text()))
    text = README + "".join(path.read_text() for path in ROOT.glob("docs/*.md"))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text))
    assert named, "no flag is named at all"
    assert named <= known


def test_no_figure_is_left_to_be_filled_in():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = path.read_text()
        assert not re.findall(r"\b(?:[A-Z]{4,}(?:NEW|OLD|ALL)|TODO|XX+)\b", text), path
        assert not re.findall(r"\b[A-Z]{3,} (?:%|points)", text), path  # a word where a number belongs


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
        aim = path.parent / target if target else path
        assert aim.exists(), target
        assert not anchor or anchor in anchors(aim), f"{target}#{anchor}"


def test_every_function_that_the_readme_names_exists():
    for module, name in re.findall(r"`(losses|gradcam)\.(\w+)`", README):
        assert hasattr(__import__(module), name)
