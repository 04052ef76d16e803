"""Learning without Memorizing: the method, and the rooms around it."""

from pathlib import Path

__version__ = "0.1.0"
# models/ stays at the top of a checkout, where a reader looks for it, and is lwm.models in code everywhere.
__path__.append(str(Path(__file__).resolve().parent.parent))
