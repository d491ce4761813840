"""Every tutorial runs, and what is committed of it is what its script says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "tutorials"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
PATHS = re.compile(r"/(root|home|Users|tmp|work|usr|opt)/|site-packages|[A-Z]:\\")
each_tutorial = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def load(name):
    """A script of tutorials/, as a module."""
    spec = importlib.util.spec_from_file_location(f"tutorials_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@each_tutorial
def test_a_tutorial_runs_without_a_warning(script):
    environment = os.environ | {"PYPROELBO_SMOKE": "1", "MPLBACKEND": "Agg", "PYTHONWARNINGS": ""}
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@each_tutorial
def test_the_notebook_is_that_of_the_script(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), 4)
    cells = jupytext.read(script).cells
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in cells
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@each_tutorial
def test_the_outputs_are_fit_to_be_shown(script):
    path = script.with_suffix(".ipynb")
    found = outputs(nbformat.read(path, 4))
    assert not [o for o in found if o.output_type == "error" or o.get("name") == "stderr"]
    text = "\n".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in found)
    assert not PATHS.search(text), PATHS.search(text)
    assert path.stat().st_size < 400_000


@each_tutorial
def test_the_figure_of_the_readme_is_the_notebook_s(script):
    figure = load("run").figure(nbformat.read(script.with_suffix(".ipynb"), 4))
    path = FOLDER / "figures" / f"{script.stem}.png"
    assert path.exists() == (figure is not None)
    assert figure is None or (path.read_bytes() == figure and len(figure) < 100_000)


@each_tutorial
def test_an_animation_is_in_a_file_that_the_notebook_shows(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), 4)
    tagged = [c for c in notebook.cells if "animation" in c.metadata.get("tags", ())]
    path = FOLDER / "figures" / f"{script.stem}.gif"
    assert path.exists() == bool(tagged)
    if tagged:
        assert path.read_bytes().startswith(b"GIF8") and path.stat().st_size < 400_000
        assert not [o for o in tagged[0].outputs if "image/gif" in o.get("data", {})]
        assert any(f"(figures/{path.name})" in c.source for c in notebook.cells)


def test_the_readme_lists_all_tutorials():
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(tutorials/(\d\d_\w+)\.ipynb\)", readme)
    assert listed == [script.stem for script in SCRIPTS]


def test_a_script_becomes_the_same_notebook_each_time(tmp_path):
    run, script = load("run"), tmp_path / "00_trial.py"
    script.write_text(
        "# %% [markdown]\n# Words.\n\n# %%\nimport os\n\nprint('PYPROELBO_SMOKE' in os.environ)\n"
        '\n# %% tags=["figure"]\nimport matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()\n'
        '\n# %% tags=["animation"]\nfrom IPython.display import Image, display\n'
        "\ndisplay(Image(b'GIF89a', format='gif'))\n"
    )
    written = []
    for smoke in (False, True, False):
        notebook = run.execute(script, smoke)
        assert notebook.cells[1].outputs[0].text == f"{smoke}\n"
        run.write(notebook, script)
        written.append(script.with_suffix(".ipynb").read_bytes())
    assert written[0] == written[2] != written[1]
    assert (tmp_path / "figures" / "00_trial.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "00_trial.gif").read_bytes() == b"GIF89a"
    assert not notebook.cells[3].outputs


def test_tutorials_are_found_by_how_their_names_start():
    run = load("run")
    assert run.scripts() == SCRIPTS
    assert [path.name[:2] for path in run.scripts(["01"])] == ["01"]
    with pytest.raises(SystemExit, match="no tutorial starts with '99'"):
        run.scripts(["99"])


def test_the_page_of_names_is_up_to_date():
    names = load("names")
    assert names.PAGE.read_text(encoding="utf-8") == names.page(), "run python tutorials/names.py"
