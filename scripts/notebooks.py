"""Run notebooks/ and keep what they show: `make notebooks`.

Each runs in a folder of its own, so what it saves is gone afterwards.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SECONDS_A_CELL, SECONDS_TO_START = 1800, 300  # on a machine that others use too


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with what its cells gave; the exception of a cell that raised one."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # Sockets in the folder: no port of this machine is opened.
        kernel = Config({"KernelManager": {"transport": "ipc", "ip": str(Path(folder) / "kernel")}})
        NotebookClient(
            notebook,
            timeout=SECONDS_A_CELL,
            startup_timeout=SECONDS_TO_START,
            kernel_name="python3",
            config=kernel,
            record_timing=False,  # the file changes where results do
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what libraries say of this machine on stderr teaches nobody anything
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    # The kernel writes down its version.
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    for path in [NOTEBOOKS / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")):
        nbformat.write(executed(path), path)
        print(path)
