"""Learning without Memorizing: the method, and the rooms around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lwm.api import Classifier as Classifier

__version__ = "0.1.0"
# models/ stays at the top of a checkout, where a reader looks for it, and is lwm.models in code everywhere; a wheel has
# it in its place.
if not (Path(__file__).parent / "models").exists():
    __path__.append(str(Path(__file__).resolve().parent.parent))

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """``from lwm import Classifier``; imported when it is asked for, since it needs torch."""
        if name != "Classifier":
            raise AttributeError(f"module 'lwm' has no attribute {name!r}")
        from lwm.api import Classifier

        return Classifier
