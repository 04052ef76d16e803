"""The settings table of README is what the code recommends."""

from dataclasses import fields
from pathlib import Path

from lwm.runtime import settings

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_settings_table_is_what_is_recommended():
    columns = ["digits", "cifar100", "folder"]
    assert settings.RECOMMENDED["cifar10"] == settings.RECOMMENDED["cifar100"]
    for name in settings.RECOMMENDED["digits"]:
        help = next(f.metadata["help"] for f in fields(settings.Settings) if f.name == name).split(": ")[0]
        cells = [str(settings.RECOMMENDED[column][name]) for column in columns]
        assert f"| `{name.upper()}` | {help} | {' | '.join(cells)} |\n" in README
