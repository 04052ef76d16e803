"""The settings table of README is what the code recommends."""

from dataclasses import fields
from pathlib import Path

from lwm.runtime import settings
from lwm.runtime.recommended import FOLLOWING, OF_DATASET, RATES

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_settings_table_is_what_is_recommended():
    columns = ["digits", "cifar100", "folder"]
    assert OF_DATASET["cifar10"] == OF_DATASET["cifar100"]
    assert set(FOLLOWING) <= OF_DATASET["digits"].keys()
    for name in OF_DATASET["digits"]:
        help = next(f.metadata["help"] for f in fields(settings.Settings) if f.name == name).split(": ")[0]
        help += ", for a batch of 128" if name in RATES else ""
        values = [OF_DATASET[column].get(name) for column in columns]
        cells = ["by the images" if value is None else str(value) for value in values]
        assert f"| `{name.upper()}` | {help} | {' | '.join(cells)} |\n" in README
