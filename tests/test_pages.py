"""The pages of the site: each block runs after those above it, and nothing is left out."""

import contextlib
import inspect
import io
import re
from pathlib import Path

import matplotlib
import pytest
import torch

import pyproelbo as pe
from pyproelbo import lightning
from pyproelbo.sequences import loops

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "tutorials"
PAGES = ["start.md", *(f"pages/{n}.md" for n in ("which_objective", "coming_from", "speed"))]
PAGES += sorted(f"how_to/{path.name}" for path in (FOLDER / "how_to").glob("*.md"))
SHORTER = {"range(1000)": "range(2)", "range(30)": "range(2)", "range(20)": "range(2)"}


def blocks(page):
    text = (FOLDER / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_after_those_above_it(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    names = {"__name__": "__main__"}
    with matplotlib.rc_context({"backend": "Agg"}):
        for i, source in enumerate(blocks(page)):
            for long, short in SHORTER.items():
                source = source.replace(long, short)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, f"{page}, block {i}", "exec"), names)


def test_every_warning_is_explained():
    text = (FOLDER / "pages" / "warnings.md").read_text(encoding="utf-8")
    public = [x for name in dir(pe) if inspect.isclass(x := getattr(pe, name))]
    warnings = [x for x in public if issubclass(x, Warning)]
    warnings += [lightning.RepeatedDataWarning, lightning.PartialDataWarning]
    warnings += [lightning.UnfinishedScheduleWarning, loops.CompileWarning]
    for warning in warnings:
        assert f"### {warning.__name__}\n\n**Cause.**" in text
