"""Every test starts clean: empty param store, seed 0, validation on, float64."""

from contextlib import contextmanager

import pyro
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tensors live: cpu, cuda, ...")


def pytest_collection_modifyitems(items):
    """Steps that should be captured and are not have to be expected, by ``pytest.warns``."""
    is_error = pytest.mark.filterwarnings("error::pyproelbo.CaptureWarning")
    for item in items:
        item.add_marker(is_error, append=False)


def pytest_configure():
    torch.set_num_threads(1)  # tensors here are small: more threads only wait for each other


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@contextmanager
def _defaults_kept():
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)


@pytest.fixture(scope="module", autouse=True)
def _clean_module():
    """What fixtures of a module set is gone when its tests are done: doctests come after it."""
    with _defaults_kept():
        yield


@pytest.fixture(autouse=True)
def _clean(device):
    with _defaults_kept():
        torch.set_default_device(device)
        torch.set_default_dtype(torch.float64)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with pyro.validation_enabled():
            yield
