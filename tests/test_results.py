"""What lies under results/ and what the documents show of it is what the code makes of the CSVs."""

from pathlib import Path

import pytest
from PIL import Image

import reproduce
from lwm.experiments import (
    against_frozen,
    calibration,
    estimates,
    favour,
    figures,
    gamma,
    long_life,
    own_images,
    real_steps,
    tables,
)
from lwm.experiments.protocols import PROTOCOLS

ROOT = Path(__file__).resolve().parent.parent
STUDIES = {
    "own-images": own_images,
    "calibration": calibration,
    "closed-form": favour,
    "against-frozen": against_frozen,
    "estimates": estimates,
    "long-life": long_life,
}
FOLDERS = sorted({path.parent for name in ("accuracy", "ablation") for path in ROOT.glob(f"results/*/{name}.csv")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_and_figures_are_those_of_the_csvs(folder, monkeypatch):
    made = {}
    monkeypatch.setattr(tables, "publish", made.update)
    monkeypatch.setattr(figures, "write", lambda figure, path, drawn_from: made.update({path: drawn_from}))
    if folder.name in STUDIES:
        rows = tables.read_rows(folder / "accuracy.csv")
        assert (folder / "table.md").read_text() == STUDIES[folder.name].table_of(rows)
        return
    protocol = PROTOCOLS[folder.name]
    reproduce.make_tables(protocol, folder)
    if protocol.methods and protocol.ablation:
        figures.draw(protocol, folder)
    figures.plt.close("all")
    there = {path: path.read_text() for path in folder.glob("*.md")}
    there |= {path: Image.open(path).text["Description"] for path in folder.glob("*.png")}
    assert made == there


def test_the_table_of_steps_is_that_of_its_csv():
    rows = tables.read_rows(real_steps.RESULTS / "steps.csv")
    assert (real_steps.RESULTS / "steps.md").read_text() == real_steps.table_of(rows)


def test_the_table_of_gamma_is_that_of_the_csvs():
    assert (gamma.RESULTS / "table.md").read_text() == gamma.table()


def test_markdown_of_results_is_tables_alone():
    for path in ROOT.glob("results/*/*.md"):
        assert {line[:1] for line in path.read_text().splitlines()} <= {"|", ""}, path


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.name)
def test_a_document_shows_each_marked_table_as_its_file_has_it(path):
    text = path.read_text()
    assert text.count("<!-- results/") == text.count("<!-- end -->") == len(tables.BLOCK.findall(text))
    assert tables.filled(text) == text
