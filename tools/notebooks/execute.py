"""Run the notebooks beside this file from top to bottom and keep what they show.

    python tools/notebooks/execute.py [--output DIRECTORY] [NOTEBOOK ...]

Without --output they are written in place. On a machine with a Hopper GPU they use it. The exit status is 1 if a
cell fails; its traceback is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import nbclient
import nbformat

DIRECTORY = Path(__file__).resolve().parent
CELL_SECONDS = 300  # a machine may be slow; a whole notebook takes some seconds


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs. Raises nbclient's CellExecutionError when a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=where).execute()
    # What would differ from run to run and machine to machine, and says nothing.
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebooks", type=Path, nargs="*", metavar="NOTEBOOK", help="default: all")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="write them there instead of in place")
    options = parser.parse_args(arguments)
    for path in options.notebooks or sorted(DIRECTORY.glob("*.ipynb")):
        try:
            notebook = execute(path.resolve())
        except nbclient.exceptions.CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        target = options.output / path.name if options.output else path
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
