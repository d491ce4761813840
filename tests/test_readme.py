"""The README and the tour, as somebody new to them would go: each block and each command."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import matplotlib
import pytest
import torch

from pyproelbo.__main__ import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "tutorials/pages/tour.md", "tutorials/pages/command.md")
}
SHORTER = {  # what takes long, at a size for tests
    "range(1000)": "range(2)",
    "max_epochs=50": "max_epochs=1",
    "held_out))": "held_out[:20]))",
}
TINY = ["--hidden", "8", "--max-steps", "3"]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where `make demo` has been run."""
    folder = tmp_path_factory.mktemp("clone")
    torch.set_default_dtype(torch.float32)
    assert main(["fit", "--out", str(folder / "run" / "demo"), *TINY]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.set_default_dtype(torch.float32)
    with matplotlib.rc_context({"backend": "Agg"}):
        yield


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_after_those_above_it(page):
    names = {"__name__": "__main__"}
    for i, source in enumerate(blocks(page, "python")):
        for long, short in SHORTER.items():
            source = source.replace(long, short)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, f"{page}, block {i}", "exec"), names)


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) < 200


def test_links_to_files_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "tutorials").glob("*/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            is_made = "api/" in link
            assert "://" in link or is_made or (page.parent / link).exists(), (page, link)


def test_every_command_runs_after_those_above_it(capsys):
    named = re.findall(r"`(python -m pyproelbo [^`]+)`", "".join(PAGES.values()))
    text = "".join(x for page in PAGES for x in blocks(page, "sh")) + "\n".join(named)
    lines = dict.fromkeys(re.findall(r"^python -m pyproelbo (.+)$", text, re.MULTILINE))
    assert len(lines) >= 7
    for line in lines:
        arguments = shlex.split(line)
        if arguments[0] == "fit":
            arguments += TINY if "--resume" not in line else ["--max-steps", "5"]
        if arguments[0] == "check":
            arguments += ["--num-samples", "25", "--max-data", "20"]
        assert main(arguments) == 0, (line, capsys.readouterr().err)
