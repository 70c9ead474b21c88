"""Execute the tutorials: docs/tutorials/NAME.py (jupytext's percent format, the source) -> NAME.ipynb with its outputs.

    python scripts/run_tutorials.py [NAME ...]

Needs the extra `docs`. Each runs in an empty folder; an error ends it, and the stored notebook stays as it was.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
NOISE = re.compile(r"\x1b\[[0-9;]*m")


def execute(source: Path) -> Path:
    """Run a tutorial and store the notebook."""
    import jupytext  # pyright: ignore[reportMissingImports]
    import nbformat  # pyright: ignore[reportMissingImports]
    from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

    notebook = jupytext.read(source)
    for cell in notebook.cells:  # in the .py a shell's line is a comment
        if cell.cell_type == "code":
            cell.source = re.sub(r"^# !", "!", cell.source, flags=re.M)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ |= {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "COLUMNS": "110",
        "PYTHONWARNINGS": "ignore",
        "TTY_COMPATIBLE": "0",  # commands show no bars
    }
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # else each run gives others
        cell.metadata = {}
        if cell.cell_type == "code":  # what pyplot's last call gives is no result
            kept = [
                o
                for o in cell.outputs
                if not str(o.get("data", {}).get("text/plain", "")).startswith("(Text(")
            ]
            cell.outputs = joined(kept)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = NOISE.sub("", output.text)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


def joined(outputs: list[Any]) -> list[Any]:
    """What was written to one stream in several pieces is one."""
    found: list[Any] = []
    for one in outputs:
        last = found[-1] if found else {}
        if one.output_type == "stream" and last.get("name") == one.name:
            last["text"] += one.text
        else:
            found.append(one)
    return found


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.py"))
    for name in names:
        print(execute(FOLDER / f"{name}.py"), flush=True)
