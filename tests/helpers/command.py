"""The command line as a user calls it, at tiny sizes, and what it has written."""

import contextlib
import csv
import json
import subprocess
import sys
import time

from pyproelbo.__main__ import main

TINY = ["--latent", "3", "--hidden", "8", "--batch-size", "16", "--device", "cpu"]
WRITTEN = {"config.json", "state.pt", "last.ckpt", "terms.csv", "summary.json", "elbo_trace.png"}
WRITTEN_OF_IMAGES = WRITTEN | {"kl_per_dim.png", "reconstructions.png"}


def fit(*arguments):
    """The exit status of ``pyproelbo fit``."""
    return main(["fit", *map(str, arguments)])


def surgery(*arguments):
    """The exit status of ``pyproelbo surgery``."""
    return main(["surgery", *map(str, arguments)])


def refused(capsys, *arguments, command=fit):
    """What a command says that refuses its arguments: one line on stderr, status 2."""
    capsys.readouterr()
    status, said = command(*arguments), capsys.readouterr()
    assert status == 2, said.err
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def trace_of(folder):
    """The rows of a run's terms.csv."""
    with (folder / "terms.csv").open() as file:
        return list(csv.DictReader(file))


def summary_of(folder):
    """A run's summary.json."""
    return json.loads((folder / "summary.json").read_text())


@contextlib.contextmanager
def endless(data, folder, *options):
    """A process that fits without end, and its run: one that has written its first checkpoint."""
    out = folder / "out"
    options = [data, *TINY, *options, "--epochs", "1000000", "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyproelbo", "fit", *map(str, options)],
        stdout=-1,
        stderr=-1,
        text=True,
        cwd=folder,
    )
    try:
        while not (out / "last.ckpt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        yield process, out
    finally:
        process.kill()
