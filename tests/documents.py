"""The pages whose statements the tests hold to the code and the results."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHOWN = "\n".join(path.read_text() for path in sorted(ROOT.glob("docs/results*.md")))
