"""Execute tutorials, and write each as a notebook with its outputs.

The scripts are what is edited and reviewed; the notebooks are made from them.

    python tutorials/run.py           # all of them
    python tutorials/run.py 02 03     # those whose names start so
    python tutorials/run.py --smoke   # at smoke size; writes nothing
"""

import argparse
import base64
import io
import os
from collections.abc import Iterable
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
SMOKE = "PYPROELBO_SMOKE"  # an environment variable: where it is set, tutorials are quick
FIGURE = "figure"  # the tag of a cell whose figure is written to figures/, too
ANIMATION = "animation"  # the tag of a cell whose GIF is written there, and shown from there


def scripts(names: Iterable[str] = ()) -> list[Path]:
    """The tutorials whose names start with one of these; all of them without names."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py"))
    for name in names:
        if not any(path.name.startswith(name) for path in found):
            raise SystemExit(f"no tutorial starts with {name!r}: {[path.stem for path in found]}")
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def execute(script: Path, smoke: bool = False) -> nbformat.NotebookNode:
    """The notebook of a script, with its outputs and nothing that changes from run to run.

    Raises:
        nbclient.exceptions.CellExecutionError: where a cell raises.
    """
    notebook = jupytext.read(script)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"
    environment = {name: value for name, value in os.environ.items() if name != SMOKE}
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment |= {SMOKE: "1"} if smoke else {}
    environment |= {"PYTHONWARNINGS": "ignore:IProgress"}  # for bars of tqdm, of which none is left
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": script.parent}},
    ).execute(env=environment)
    notebook.metadata.pop("language_info", None)  # the version of Python
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
    return notebook


def smaller(png: str) -> str:
    """The same picture with a palette, at less than half of the size.

    The palette covers all the colours that there are. One by frequency would merge those of thin
    lines.
    """
    image, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(256, Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def figure(notebook: nbformat.NotebookNode) -> bytes | None:
    """The PNG of the cell with the tag "figure"."""
    for cell in notebook.cells:
        if FIGURE in cell.metadata.get("tags", ()):
            (output,) = (out for out in cell.outputs if "image/png" in out.get("data", {}))
            return base64.b64decode(output.data["image/png"])
    return None


def animation(notebook: nbformat.NotebookNode) -> bytes | None:
    """The GIF of the cell with the tag "animation", which is taken out of the notebook."""
    for cell in notebook.cells:
        if ANIMATION in cell.metadata.get("tags", ()):
            (output,) = (out for out in cell.outputs if "image/gif" in out.get("data", {}))
            cell.outputs.remove(output)
            return base64.b64decode(output.data["image/gif"])
    return None


def write(notebook: nbformat.NotebookNode, script: Path) -> None:
    """The notebook beside its script, and its figure and its animation in figures/."""
    images = {".png": figure(notebook), ".gif": animation(notebook)}
    nbformat.write(notebook, script.with_suffix(".ipynb"))
    for suffix, image in images.items():
        if image is not None:
            (script.parent / "figures").mkdir(exist_ok=True)
            (script.parent / "figures" / f"{script.stem}{suffix}").write_bytes(image)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="how the tutorials' names start; default: all")
    parser.add_argument("--smoke", action="store_true", help="at smoke size; writes nothing")
    arguments = parser.parse_args()
    for script in scripts(arguments.names):
        print(script.stem, flush=True)
        notebook = execute(script, arguments.smoke)
        if not arguments.smoke:
            write(notebook, script)


if __name__ == "__main__":
    main()
