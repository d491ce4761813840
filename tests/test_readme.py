"""The README from top to bottom, as somebody new to it would go: each block and each command."""

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

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SHORTER = {  # what takes long, at a size for tests
    "range(1000)": "range(2)",
    "max_epochs=50": "max_epochs=1",
    "held_out))": "held_out[:20]))",
}
TINY = ["--hidden", "8", "--max-steps", "3"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


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


def test_every_block_runs_after_those_above_it():
    names, sources = {"__name__": "__main__"}, blocks("python")
    assert len(sources) > 10
    for long, short in SHORTER.items():
        assert long in README, f"{long} is not in the README any more"
        sources = [source.replace(long, short) for source in sources]
    for i, source in enumerate(sources):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, f"README.md, block {i}", "exec"), names)


def test_every_command_runs_after_those_above_it(capsys):
    text = "".join(blocks("sh")) + "\n".join(re.findall(r"`(python -m pyproelbo [^`]+)`", README))
    lines = dict.fromkeys(re.findall(r"^python -m pyproelbo (.+)$", text, re.MULTILINE))
    assert len(lines) >= 7
    for line in lines:
        arguments = shlex.split(line)
        if arguments[0] == "fit":
            arguments += TINY if "--resume" not in line else ["--max-steps", "5"]
        if arguments[0] == "check":
            arguments += ["--num-samples", "25", "--max-data", "20"]
        assert main(arguments) == 0, (line, capsys.readouterr().err)
