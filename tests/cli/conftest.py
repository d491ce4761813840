"""Data that commands are given."""

import numpy as np
import pytest


@pytest.fixture
def images(tmp_path):
    """Images of random pixels: the path of an array."""
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).random((60, 4, 4)))
    return path
