"""The process that compiles a graph."""

import os
import subprocess
import sys

from pyproelbo._backend.compilation import import_path


def test_modules_of_the_user_do_not_hide_those_of_python(tmp_path, monkeypatch):
    for name in ("types", "own"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)")
    monkeypatch.syspath_prepend(tmp_path)

    def ended(name):
        command = [sys.executable, "-P", "-c", f"import {name}, torch"]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": import_path()}).returncode

    assert ended("types") == 0 and ended("own") == 7
