"""Runs and data of others: what loads them runs no code that lies in them, as SECURITY.md says."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers.command import TINY, fit, refused, surgery

from pyproelbo import datasets
from pyproelbo.cli import load_run

pytestmark = pytest.mark.slow


class Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    torch.set_default_dtype(torch.float32)
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(40, 5)))
    assert fit(folder / "x.npy", *TINY, "--epochs", 2, "--out", folder / "run") == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    torch.set_default_dtype(torch.float32)
    return shutil.copytree(finished / "run", tmp_path / "run")


def with_code(path, made):
    """Let a file of a run, besides what it holds, hold code."""
    content = torch.load(path, weights_only=True)
    torch.save({**content, "code": Code(made)}, path)


def test_the_code_would_run(tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_a_state_with_code_is_refused(run, tmp_path, capsys):
    with_code(run / "state.pt", tmp_path / "made")
    with pytest.raises(ValueError, match=r"state.pt is damaged"):
        load_run(run)
    message = refused(capsys, run, command=surgery)
    assert "state.pt is damaged" in message
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_with_code_is_refused(run, tmp_path, capsys):
    with_code(run / "last.ckpt", tmp_path / "made")
    message = refused(capsys, "--epochs", 3, "--resume", run)
    assert "last.ckpt is damaged" in message
    assert not (tmp_path / "made").exists()


def test_data_with_code_are_refused(tmp_path):
    made, objects = tmp_path / "made", np.empty(1, object)
    objects[0] = Code(made)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "x.npz", objects)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(ValueError, match=name):
            datasets.load(tmp_path / name)
    assert not made.exists()
