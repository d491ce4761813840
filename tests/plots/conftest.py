"""Figures are drawn without a display, shown to nobody and closed."""

import matplotlib
import pytest
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def _agg(monkeypatch):
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a plot called show"))
    yield
    plt.close("all")
    matplotlib.use(backend)
