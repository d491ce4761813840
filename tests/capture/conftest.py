"""A captured step that falls back to an eager one is an error where no test expects it."""

import warnings

import pytest

import pyproelbo as pe


@pytest.fixture(autouse=True)
def _no_capture_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", pe.CaptureWarning)
        yield
