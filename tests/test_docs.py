"""What README and docs say is what the code and the results say."""

import importlib
import json
import re
from dataclasses import fields

import pytest
from documents import README, ROOT, SHOWN
from PIL import Image

import reproduce
from lwm.experiments import compare_classifiers
from lwm.experiments.protocols import PROTOCOLS
from lwm.experiments.tables import attention_table, fingerprint, mean_and_spread, read_rows, readouts_table
from lwm.runtime import settings

RESULTS = sorted([*ROOT.glob("results/*/accuracy.csv"), *ROOT.glob("results/*/ablation.csv")])


def test_every_protocol_has_results_or_is_said_to_have_none():
    text = (ROOT / "docs" / "results.md").read_text()
    not_run = re.findall(r"^- `([^`]+)`", text.split("## Not run")[1], re.M)
    run = {path.parent.name for path in RESULTS}
    assert run | set(not_run) == set(PROTOCOLS)
    assert not run & set(not_run)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}, {path.stem}")
def test_the_tables_are_those_of_the_csv(path):
    made = reproduce.table_of(PROTOCOLS[path.parent.name], path)
    assert reproduce.table_path(path).read_text() == made
    assert made in SHOWN


def rows_of(path, method, seeds, columns):
    rows = [row for row in read_rows(path) if row["method"] == method and row["seed"] in seeds]
    return {tuple(row[column] for column in columns) for row in rows if row.get("readout", "head") == "head"}


@pytest.mark.parametrize(
    ("protocol", "variant", "method", "seeds", "steps"),
    [
        ("photos32-5x4", "binary gamma=0.1", "lwm", "012", 5),
        ("photos32-10+10", "binary gamma=0.1", "lwm", "01234", 2),
        ("photos32-10+10", "softmax gamma=0", "lwf", "01234", 2),
        ("photos32-10+10", "lwf-mc beta=3", "lwf-mc", "012", 2),
        ("digits-5x2", "binary gamma=0", "lwf-mc", "012", 5),
        ("digits-5x2", "binary gamma=0.1", "lwm", "012", 5),
        ("digits-5x2", "softmax gamma=0", "lwf", "01234", 5),
    ],
)
def test_a_cell_that_was_run_twice_gave_the_same_numbers(protocol, variant, method, seeds, steps):
    """These are the same training: in another folder, from another commit, on the same kind of processor."""
    folder = ROOT / "results" / protocol
    columns = ("seed", "step", "accuracy", "accuracy_old", "accuracy_new", "task_aware", "forgetting")
    columns += () if variant.endswith("gamma=0") else ("zero_maps",)  # a method without L_AD has no maps to count
    again = rows_of(folder / "ablation.csv", variant, seeds, columns)
    assert len(again) == len(seeds) * steps
    assert again == rows_of(folder / "accuracy.csv", method, seeds, columns)


@pytest.mark.parametrize(("variant", "method"), [("binary gamma=0.1", "lwm"), ("softmax gamma=0", "lwf")])
def test_the_networks_of_the_fields_read_outs_are_those_of_the_ablation(variant, method):
    folder, columns = ROOT / "results" / "photos32-5x4", ("seed", "step", "accuracy")
    again = rows_of(folder / "ablation.csv", variant, "34", columns)
    assert len(again) == 10
    assert again == rows_of(folder / "field.csv", method, "34", columns)


def test_the_plain_trial_gave_the_numbers_of_lwm():
    folder, columns = ROOT / "results" / "photos32-5x4", ("seed", "step", "accuracy")
    again = rows_of(folder / "trials.csv", "plain", "012", columns)
    assert len(again) == 15
    assert again == rows_of(folder / "accuracy.csv", "lwm", "012", columns)


@pytest.mark.parametrize(
    ("name", "table", "row"),
    [
        ("digits, 2 + 2", "digits-2+2/table.md", "lwm − lwf-mc"),  # noqa: RUF001
        ("digits, 5 steps of 2", "digits-5x2/table.md", "lwm − lwf-mc"),  # noqa: RUF001
        ("photos, 10 + 10", "photos32-10+10/ablation_table.md", "binary gamma=0.1 − binary gamma=0"),  # noqa: RUF001
        ("photos, 5 steps of 4", "photos32-5x4/ablation_table.md", "binary gamma=0.1 − binary gamma=0"),  # noqa: RUF001
        *(
            (f"{data}, softmax form", f"{folder}/ablation_table.md", "softmax gamma=0.1 − softmax gamma=0")  # noqa: RUF001
            for data, folder in (
                ("digits, 5 steps of 2", "digits-5x2"),
                ("photos, 10 + 10", "photos32-10+10"),
                ("photos, 5 steps of 4", "photos32-5x4"),
            )
        ),
    ],
)
def test_the_answer_on_gamma_is_that_of_the_tables(name, table, row):
    def cells(text, first):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
        return [cell.strip() for cell in line.strip("|").split("|")]

    made = (ROOT / "results" / table).read_text()
    heads, values = cells(made, "difference"), cells(made, row)
    section = (ROOT / "docs" / "results.md").read_text().partition("## How to read the tables")[0]
    assert cells(section, name)[1:5] == [values[heads.index(head)] for head in ("all", "old", "new", "seeds")]


def test_the_table_of_the_prior_is_that_of_its_csv():
    folder = ROOT / "results" / "start-at-prior"
    table = (folder / "table.md").read_text()
    for start, name in (("prior", "1 / classes"), ("half", "one half")):
        rows = [row for row in read_rows(folder / "curves.csv") if row["method"] == start]
        for epoch in ("1", "2", "5", "10", "15", "20"):
            values = [float(row["accuracy"]) for row in rows if row["step"] == epoch]
            (line,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
            assert f"| {mean_and_spread(values)} |" in line
    assert table in SHOWN


FIGURES = {"steps": ["accuracy"], "attention": ["attention"], "plane": ["ablation", "accuracy"]}


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("results/*/*.png")), ids=lambda path: f"{path.parent.name}, {path.stem}"
)
def test_the_figures_are_drawn_from_the_csv(path):
    sources = [path.with_name(f"{name}.csv") for name in FIGURES[path.stem]]
    assert Image.open(path).text["Description"] == fingerprint(*sources)
    assert f"(../results/{path.parent.name}/{path.name})" in SHOWN


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/*attention.csv")), ids=lambda path: path.parent.name)
def test_the_tables_of_attention_are_those_of_the_csv(path):
    table = path.with_name("ablation.csv" if path.stem.startswith("ablation") else "accuracy.csv")
    made, text = attention_table(PROTOCOLS[path.parent.name], table), SHOWN
    assert path.with_suffix(".md").read_text() == made
    assert made in text or f"(../results/{path.parent.name}/{path.stem}.md)" in text


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/*readouts.md")), ids=lambda path: path.parent.name)
def test_the_tables_of_read_outs_are_those_of_the_csv(path):
    table = path.with_name("ablation.csv" if path.stem.startswith("ablation") else "accuracy.csv")
    made, text = readouts_table(PROTOCOLS[path.parent.name], table), SHOWN
    assert path.read_text() == made
    assert made in text or f"(../results/{path.parent.name}/{path.name})" in text


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/field.csv")), ids=lambda path: path.parent.name)
def test_the_tables_of_the_field_are_those_of_the_csv(path):
    search = path.parent.with_name(compare_classifiers.SEARCH.get(path.parent.name, path.parent.name)) / path.name
    assert path.with_suffix(".md").read_text() == compare_classifiers.table(path, search)
    assert f"(../results/{path.parent.name}/field.md)" in SHOWN


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/trials.csv")), ids=lambda path: path.parent.name)
def test_the_tables_of_trials_are_those_of_the_csv(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    trials = importlib.import_module("trials")
    assert path.with_suffix(".md").read_text() == trials.table(path)
    assert trials.summary(trials.cells_of(path)) in SHOWN
    assert f"(../results/{path.parent.name}/trials.md)" in SHOWN


def test_what_was_tried_is_as_the_tables_of_the_trials_have_it():
    """Every trial has its row, or two, and what it has over plain."""
    text = (ROOT / "docs" / "results-trials.md").read_text()
    name, told = "", set()
    for line in text.partition("| trial | what changes |")[2].partition("\n\n")[0].splitlines()[2:]:
        trial, _, where, over, seeds, _ = (cell.strip() for cell in line.strip("|").split("|"))
        name = trial or name
        (made,) = re.findall(
            rf"^\| {re.escape(name)} \| (.*) \|$",
            (ROOT / "results" / where / "trials.md").read_text().partition("\n\n")[0],
            re.M,
        )
        cells = made.split(" | ")
        assert (over, seeds) == (cells[2], cells[5])
        told.add((where, name))
    made = [
        (path.parent.name, line.split(" | ")[0].strip("| "))
        for path in ROOT.glob("results/*/trials.md")
        for line in path.read_text().partition("\n\n")[0].splitlines()[3:]
    ]
    of_bf16_alone = {"longer", "projection=1", "ema=0.99"}
    assert told == {each for each in made if each[0] != "photos32-search" or each[1] in of_bf16_alone}


@pytest.mark.parametrize("name", ["steps", "levers", "data", "estimate"])
def test_the_tables_of_costs_are_those_of_the_measurements(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    made = getattr(importlib.import_module("performance_tables"), name)()
    assert made.count("\n") > 2
    assert made in (ROOT / "docs" / "performance.md").read_text()


def test_what_bf16_costs_where_it_is_emulated_is_as_measured():
    names = ("resnet32-bf16-emulated", "resnet32-fp32-no-bf16")
    figures = [json.loads((ROOT / "results" / "performance" / f"{name}.json").read_text()) for name in names]
    emulated, plain = (round(each["images_per_second"]["lwm"]) for each in figures)
    text = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    assert f"lwm then has {emulated} images/s, and {plain} in fp32" in text


def test_what_a_step_costs_where_a_processor_has_amx_is_as_measured():
    folder = ROOT / "results" / "performance"
    bf16, fp32 = (json.loads((folder / f"resnet32-{name}-amx.json").read_text()) for name in ("bf16", "fp32"))
    speeds = "lwm has {:.0f} images/s in bf16, and {:.0f} in fp32".format(
        *(each["images_per_second"]["lwm"] for each in (bf16, fp32))
    )
    steps = "which is {:.2f} and {:.2f} fine-tuning steps".format(*(each["ratio"]["lwm"] for each in (bf16, fp32)))
    floors = "at a floor of {:.2f} and {:.2f}".format(*(each["floor"] for each in (bf16, fp32)))
    text = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    assert f"{speeds}, {steps} {floors}" in text


@pytest.mark.parametrize("name", ["digits-2+2", "photos32-10+10", "photos32-5x4"])
def test_the_readme_shows_the_main_tables(name):
    table = (ROOT / "results" / name / "table.md").read_text()
    assert table.split("\n\n")[1] in README


def test_the_settings_table_is_what_is_recommended():
    columns = ["digits", "cifar100", "folder"]
    assert settings.RECOMMENDED["cifar10"] == settings.RECOMMENDED["cifar100"]
    for name in settings.RECOMMENDED["digits"]:
        help = next(f.metadata["help"] for f in fields(settings.Settings) if f.name == name).split(": ")[0]
        cells = [str(settings.RECOMMENDED[column][name]) for column in columns]
        assert f"| `{name.upper()}` | {help} | {' | '.join(cells)} |\n" in README
