"""What CONTRIBUTING.md says holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_doors_open():
    """Its examples run, one after the other, as it says: in a process, for they register things."""
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    script = "import torch\ntorch.manual_seed(0)\n" + "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Entropy of q, nats per datum (50 data)" in done.stdout


def test_all_that_it_names_is_there():
    names = set(re.findall(r"`([\w./]+\.(?:py|pyi|md))`", TEXT))
    assert len(names) > 20
    inside = [path for path in (ROOT / "pyproelbo").iterdir() if path.is_dir()]
    folders = [ROOT, ROOT / "pyproelbo", ROOT / "tests", *inside]
    for name in names:
        assert any((folder / name).exists() for folder in folders), name


def test_the_order_of_packages_is_that_of_the_imports():
    rows = re.findall(r"^\| `([\w.]+)`(?:, `([\w.]+)`)? \|", TEXT, re.MULTILINE)
    named = [name.removesuffix(".py") for pair in rows for name in pair if name]
    test = (ROOT / "tests" / "test_package.py").read_text(encoding="utf-8")
    order = re.findall(r'"(\w+)"', re.search(r"ORDER = \((.*?)\)", test, re.DOTALL)[1])
    assert named == [name for name in order if name != "pyproelbo"]
