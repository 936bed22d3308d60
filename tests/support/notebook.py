"""Read a notebook, so that tests can run its code without Jupyter, which the project does not depend on."""

import json
from pathlib import Path
from typing import Any


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    """Return the cells in order, each with `cell_type`, `source` (its lines) and, for code, `outputs`."""
    cells: list[dict[str, Any]] = json.loads(notebook.read_text())["cells"]
    return cells


def code_of(notebook: Path) -> str:
    """Return the code of all cells as one program that does in a plain process what the cells do one by one."""
    return "\n\n".join("".join(cell["source"]) for cell in cells_of(notebook) if cell["cell_type"] == "code") + "\n"
