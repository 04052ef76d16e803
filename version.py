"""The version of this project, which pyproject.toml says."""

from __future__ import annotations

import tomllib
from pathlib import Path

VERSION: str = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]["version"]
