"""Differences and means that the pages quote and no table has are those of the results."""

import re
import statistics

import pytest
from documents import ROOT, SHOWN

import field
from tables import paired, read_rows


def by_seed(path, method, column, steps=slice(-1, None), seeds="012345"):
    """Seed -> mean of the column over those steps; field.csv's rows are those of the head."""
    found = {}
    for row in read_rows(ROOT / "results" / path):
        if row["method"] == method and row["seed"] in seeds and row.get("readout", "head") == "head":
            found.setdefault(row["seed"], []).append(row[column])
    return {seed: statistics.mean(map(float, values[steps])) for seed, values in found.items()}


PHOTOS, ONE_STEP, DIGITS = (f"{name}/accuracy.csv" for name in ("photos32-5x4", "photos32-10+10", "digits-5x2"))
ABLATION, STUDENTS = "photos32-5x4/ablation.csv", slice(1, None)


@pytest.mark.parametrize(
    ("one", "other", "mean", "interval"),
    [
        ((PHOTOS, "lwm", "accuracy"), (PHOTOS, "lwf", "accuracy"), "+5.1", "+3.0 to +7.3"),
        ((ONE_STEP, "lwm", "accuracy"), (ONE_STEP, "lwf", "accuracy"), "+2.2", "+0.0 to +4.4"),
        ((DIGITS, "lwf", "accuracy"), (DIGITS, "lwm", "accuracy"), "+9.3", "+0.4 to +18.2"),
        ((DIGITS, "lwf", "accuracy", slice(None)), (DIGITS, "lwm", "accuracy", slice(None)), "+4.0", "-1.4 to +9.3"),
        *(
            (("digits-2+2/ablation.csv", "lwm lr=0.02", column), ("digits-2+2/accuracy.csv", "lwm", column), *found)
            for column, *found in (("accuracy", "+4.8", "-0.9 to +10.5"), ("discriminant", "-0.4", "-2.1 to +1.2"))
        ),
        ((ONE_STEP, "finetune", "discriminant"), (ONE_STEP, "lwm", "accuracy"), "-2.1", "-7.1 to +2.9"),
        (
            (ABLATION, "binary gamma=1", "accuracy_new", STUDENTS, "012"),
            (ABLATION, "binary gamma=0", "accuracy_new", STUDENTS, "012"),
            "-18.7",
            "-27.9 to -9.5",
        ),
        (
            (ABLATION, "binary gamma=0.1", "discriminant", slice(-1, None), "345"),
            (ABLATION, "binary gamma=0", "discriminant", slice(-1, None), "345"),
            "-0.6",
            "-4.7 to +3.6",
        ),
        *(
            (
                (ABLATION, f"softmax gamma={gamma}", "discriminant"),
                (ABLATION, "softmax gamma=0", "discriminant"),
                *found,
            )
            for gamma, *found in (
                (0.03, "-0.8", "-2.6 to +0.9"),
                (0.1, "-2.6", "-4.9 to -0.3"),
                (0.3, "-0.7", "-7.4 to +6.0"),
                (1, "-5.0", "-9.8 to -0.3"),
            )
        ),
        *(
            (
                ("digits-5x2/ablation.csv", f"{form} gamma={gamma}", "discriminant", steps, seeds),
                ("digits-5x2/ablation.csv", f"{form} gamma=0", "discriminant", steps, seeds),
                *found,
            )
            for form, gamma, steps, seeds, *found in (
                ("softmax", 0.03, slice(-1, None), "01234", "+0.4", "-2.7 to +3.4"),
                ("softmax", 0.1, slice(-1, None), "012", "+3.0", "-1.9 to +8.0"),
                ("softmax", 0.3, slice(-1, None), "012", "+5.2", "-0.4 to +10.8"),
                ("softmax", 1, slice(-1, None), "012", "+6.1", "+2.0 to +10.3"),
                ("softmax", 1, slice(-1, None), "01234", "+5.8", "-2.7 to +14.2"),
                ("softmax", 1, slice(None), "01234", "+3.3", "+0.7 to +6.0"),
                ("softmax", 0.1, slice(None), "012", "+0.7", "+0.5 to +1.0"),
                ("binary", 0.1, slice(-1, None), "012", "-0.6", "-9.3 to +8.1"),
                ("binary", 0.3, slice(-1, None), "012", "+3.9", "+1.2 to +6.5"),
                ("binary", 1, slice(-1, None), "012", "+9.3", "-8.4 to +27.0"),
            )
        ),
        (
            ("digits-5x2/ablation.csv", "softmax gamma=1", "discriminant"),
            (DIGITS, "frozen", "discriminant"),
            "-6.1",
            "-10.2 to -2.0",
        ),
        *(
            (
                (ABLATION, "attention=features at 0.0125", column, slice(-1, None), "345"),
                (ABLATION, "binary gamma=0", column, slice(-1, None), "345"),
                *found,
            )
            for column, *found in (
                ("accuracy", "+0.4", "-8.1 to +9.0"),
                ("accuracy_new", "-4.7", "-5.6 to -3.7"),
            )
        ),
        *(
            (
                (ABLATION, name, column, slice(-1, None), "345"),
                (ABLATION, "binary gamma=0", column, slice(-1, None), "345"),
                *found,
            )
            for name, column, *found in (
                ("binary gamma=0.1", "accuracy", "+1.0", "-5.9 to +7.9"),
                ("attention=through-features", "accuracy", "-0.4", "-4.5 to +3.7"),
                ("attention=signed", "accuracy", "+1.0", "-5.4 to +7.5"),
                ("attention=features", "accuracy", "-6.3", "-16.3 to +3.7"),
                ("attention=features", "discriminant", "-7.0", "-22.4 to +8.4"),
            )
        ),
        *(
            (
                ("photos32-10+10/ablation.csv", f"binary gamma={gamma}", "discriminant", slice(-1, None), "012"),
                ("photos32-10+10/ablation.csv", "binary gamma=0", "discriminant", slice(-1, None), "012"),
                *found,
            )
            for gamma, *found in ((0.3, "-1.7", "-4.7 to +1.3"), (1, "-4.2", "-6.6 to -1.8"))
        ),
        *(
            (
                ("photos32-10+10/ablation.csv", f"softmax gamma={gamma}", column, slice(-1, None), seeds),
                ("photos32-10+10/ablation.csv", "softmax gamma=0", column, slice(-1, None), seeds),
                *found,
            )
            for gamma, column, seeds, *found in (
                (0.03, "accuracy", "012", "+1.0", "+0.2 to +1.8"),
                (0.03, "discriminant", "01234", "-0.1", "-0.5 to +0.4"),
                (1, "discriminant", "012", "-2.3", "-2.5 to -2.1"),
            )
        ),
        *(
            (
                ("photos32-10+10/ablation.csv", f"binary gamma={gamma}", "accuracy", slice(-1, None), seeds),
                ("photos32-10+10/ablation.csv", f"softmax gamma={gamma}", "accuracy", slice(-1, None), seeds),
                *found,
            )
            for gamma, seeds, *found in ((0, "01234", "+1.8", "-0.1 to +3.6"), (0.03, "012", "+0.2", "-3.8 to +4.3"))
        ),
        *(
            (
                ("photos32-10+10/ablation.csv", one, column, slice(-1, None), "012"),
                ("photos32-10+10/ablation.csv", f"lwf-mc beta={beta}", column),
                *found,
            )
            for one, beta, column, *found in (
                ("lwf-mc beta=1", 0, "discriminant", "+4.2", "+1.6 to +6.9"),
                ("lwf-mc beta=3", 1, "accuracy", "-0.4", "-1.3 to +0.5"),
                ("lwf-mc beta=10", 1, "accuracy", "-9.8", "-16.9 to -2.7"),
                ("binary gamma=0.3", 3, "accuracy", "+0.3", "-1.2 to +1.7"),
                ("binary gamma=1", 10, "accuracy_old", "+0.8", "-1.0 to +2.5"),
                ("binary gamma=1", 10, "accuracy_new", "+16.0", "+5.0 to +27.0"),
            )
        ),
        (
            (ABLATION, "batch_norm=frozen lr=0.01", "discriminant"),
            (ABLATION, "batch_norm=train lr=0.01", "discriminant"),
            "+1.7",
            "+0.6 to +2.9",
        ),
        (
            (ABLATION, "batch_norm=frozen lr=0.01", "accuracy"),
            (ABLATION, "binary gamma=0.1", "accuracy"),
            "-9.9",
            "-14.2 to -5.7",
        ),
        (
            (ABLATION, "binary gamma=0", "accuracy", slice(-1, None), "345"),
            (ABLATION, "softmax gamma=0", "accuracy", slice(-1, None), "345"),
            "+5.2",
            "-0.6 to +11.0",
        ),
        (
            ("photos32-10+10-fp32/accuracy.csv", "lwm", "accuracy"),
            ("photos32-10+10-bf16/accuracy.csv", "lwm", "accuracy"),
            "+1.6",
            "-6.5 to +9.7",
        ),
        (("photos32-5x4/field.csv", "lwm", "accuracy"), (PHOTOS, "lwm", "accuracy"), "+1.5", "-1.0 to +4.0"),
    ],
)
def test_differences_that_no_table_has_are_those_of_the_csv(one, other, mean, interval):
    ours, theirs = by_seed(*one), by_seed(*other)
    assert paired([(ours[seed], theirs[seed]) for seed in ours]) == f"{mean} ({interval})"
    assert interval in " ".join(SHOWN.split())


@pytest.mark.parametrize(
    ("of", "mean"),
    [
        ((PHOTOS, "lwf", "accuracy", slice(1)), "55.0"),
        ((PHOTOS, "lwm", "accuracy", slice(1)), "69.0"),
        ((ONE_STEP, "lwf", "accuracy", slice(1)), "55.2"),
        ((ONE_STEP, "lwm", "accuracy", slice(1)), "55.7"),
        ((ABLATION, "binary gamma=0", "accuracy_new", slice(-1, None), "345"), "52.6"),
        ((ABLATION, "binary gamma=0", "accuracy_new", STUDENTS, "012"), "61.7"),
        ((ABLATION, "binary gamma=1", "accuracy_new", STUDENTS, "012"), "43.0"),
        (("photos32-5x4/ablation_attention.csv", "binary gamma=0", "distance", slice(None), "345"), "2.10"),
        (("photos32-5x4/ablation_attention.csv", "binary gamma=0.1", "distance", slice(None), "345"), "1.41"),
    ],
)
def test_means_that_no_table_has_are_those_of_the_csv(of, mean):
    digits = len(mean.partition(".")[2])
    assert f"{statistics.mean(by_seed(*of).values()):.{digits}f}" == mean
    assert re.search(rf"\b{re.escape(mean)}\b", SHOWN)


def test_the_fields_read_outs_over_ten_steps_are_those_of_the_csv():
    page = (ROOT / "docs" / "results-photos32-10x10.md").read_text()
    table = (
        page.partition("## Against the field's read-outs")[2]
        .partition("|---|---|---|---|---|\n")[2]
        .partition("\n\n")[0]
    )
    shown = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in table.splitlines())}
    found = {}
    for (method, name, _), seeds in field.averages(ROOT / "results" / "photos32-10x10" / "field.csv").items():
        found.setdefault(name, {})[method] = [f"{value:.1f}" for value in seeds["0"]]
    assert shown == {name: each["lwm"] + each["lwf"] for name, each in found.items()}


@pytest.mark.parametrize(
    ("protocol", "method", "column", "age", "found"),
    [
        ("photos32-5x4", "lwm", "mean_off_carried", 1, "0.24"),
        ("photos32-10x10", "lwm", "mean_off_carried", 1, "0.24"),
        ("photos32-10x10", "lwf", "mean_off_carried", 1, "0.18"),
        ("photos32-10x10", "lwm", "mean_off_left", 1, "0.34"),
        ("photos32-10x10", "lwf", "mean_off_left", 1, "0.33"),
        ("photos32-10x10", "lwm", "mean_off_carried", 5, "0.43"),
        ("photos32-10x10", "lwf", "mean_off_carried", 5, "0.24"),
        ("photos32-10x10", "lwm", "mean_off_carried", 9, "0.51"),
        ("photos32-10x10", "lwf", "mean_off_carried", 9, "0.30"),
        ("photos32-10x10", "lwm", "covariance_off_carried", 1, "0.58"),
        ("photos32-10x10", "lwf", "covariance_off_carried", 1, "0.50"),
        ("photos32-10x10", "lwm", "covariance_off_carried", 5, "1.18"),
        ("photos32-10x10", "lwf", "covariance_off_carried", 5, "0.80"),
        ("photos32-10x10", "lwm", "covariance_off_carried", 9, "1.96"),
        ("photos32-10x10", "lwf", "covariance_off_carried", 9, "1.28"),
    ],
)
def test_how_far_statistics_are_off_some_steps_after_their_own(protocol, method, column, age, found):
    """``age`` is the number of steps since the class came, which is one before its first row."""
    rows = [row for row in read_rows(ROOT / "results" / protocol / "attention.csv") if row["method"] == method]
    came = {}
    for row in rows:
        came.setdefault((row["seed"], row["class"]), int(row["step"]) - 1)
    values = [float(row[column]) for row in rows if int(row["step"]) - came[row["seed"], row["class"]] == age]
    assert f"{statistics.mean(values):.2f}" == found
    assert found in (ROOT / "docs" / "results-photos32-10x10.md").read_text()
