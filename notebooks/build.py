"""Make the notebooks from their scripts, run them and keep their outputs: `python notebooks/build.py [number …]`.

The script half (`src/NN_name.py`) is what one edits; each `.ipynb` is made from it and executed from a clean kernel.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def _is_progress_bar(output) -> bool:
    """Stored, a progress bar stands still at its first or last state."""
    data = output.get("data", {})
    return "application/vnd.jupyter.widget-view+json" in data and re.search(r"\d+%\|", data.get("text/plain", ""))


def build(script: Path) -> Path:
    """Script -> executed notebook, written whole or not at all."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"  # not random: the same script gives the same file
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress_bar(output)]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # not this machine's version
    path = FOLDER / f"{script.stem}.ipynb"
    temporary = path.with_name(f".{path.name}")
    nbformat.write(notebook, temporary)
    temporary.replace(path)
    return path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="which notebooks, such as 00 07; all without")
    args = parser.parse_args()
    for script in sorted((FOLDER / "src").glob("*.py")):
        if not args.numbers or script.name.split("_")[0] in args.numbers:
            started = time.monotonic()
            path = build(script)
            print(f"{path.name}: {time.monotonic() - started:.0f} s, {path.stat().st_size / 2**10:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
