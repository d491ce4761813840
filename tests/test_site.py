"""The site: its formulas, and that every name has what its page promises."""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import pyproelbo as pe
from pyproelbo._results.result import Result

TUTORIALS = Path(__file__).parent.parent / "tutorials"


@pytest.fixture(scope="module")
def site():
    """From the name of a module of the site to it."""
    folders = [str(TUTORIALS / "site"), str(TUTORIALS)]
    sys.path[:0] = folders
    yield importlib.import_module
    for folder in folders:
        sys.path.remove(folder)


class TestFormulas:
    @pytest.mark.parametrize(
        ("plain", "expected"),
        [
            ("E_q[log p(x | z)]", r"\mathbb{E}_{q}[\log p(x \mid z)]"),
            ("sum_z beta_z KL_z", r"\sum_{z} \beta_{z} \mathrm{KL}_{z}"),
            ("KL(q || p)", r"\mathrm{KL}(q \,\Vert\, p)"),
            ("gamma |KL / N - C|", r"\gamma \lvert \mathrm{KL} / N - C\rvert"),
            ("w_nk^(1 - alpha)", r"w_{nk}^{1 - \alpha}"),
            ("p(x_0, ..., x_{T-1})", r"p(x_{0}, \dots , x_{T-1})"),
            ("k = num_steps", r"k = \mathtt{num\_steps}"),
            (
                "average KL = mutual information",
                r"\text{average } \mathrm{KL} = \text{ mutual information}",
            ),
        ],
    )
    def test_plain_text_is_read_as_a_mathematician_would(self, site, plain, expected):
        latex = site("formulas").latex

        def squeezed(text):
            return re.sub(r"\s+", "", text)

        assert squeezed(latex(plain)) == squeezed(expected)

    def test_all_of_docstrings_can_be_drawn(self, site):
        converted, mathml = site("docstrings").converted, site("mathml").mathml

        num = 0
        for name in dir(pe):
            lines = converted((inspect.getdoc(getattr(pe, name)) or "").splitlines())
            text = "\n".join(lines)
            for formula in re.findall(r"\.\. math::\n\n    (.+)\n", text):
                assert "<mo" in mathml(formula, "block"), (name, formula)
                num += 1
        assert num > 20

    def test_all_of_tutorials_can_be_drawn(self, site):
        mathml = site("mathml").mathml

        for path in TUTORIALS.glob("*.py"):
            prose = "\n".join(
                re.findall(r'^r?"""\n(.*?)^"""', path.read_text("utf-8"), re.S | re.M)
            )
            for formula in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", prose, re.S):
                mathml("".join(formula))


def test_each_figure_and_each_result_has_a_picture(site):
    gallery = site("gallery")

    drawn = {gallery.SAME.get(name, name) for name in (*gallery.PICTURES, *gallery.SAME)}
    for name in dir(pe):
        x = getattr(pe, name)
        is_result = inspect.isclass(x) and issubclass(x, Result)
        if name.startswith("plot_") or is_result:
            assert gallery.SAME.get(name, name) in drawn, name


def test_versions_are_offered_the_newest_first(site, tmp_path):
    for name in ("main", "v0.2.0", "v0.10.0", "v0.9.1", "figures"):
        (tmp_path / name).mkdir()
    switcher = site("switcher")
    switcher.main(str(tmp_path), "https://example.org/docs/")
    found = json.loads((tmp_path / "switcher.json").read_text("utf-8"))
    assert [each["version"] for each in found] == ["v0.10.0", "v0.9.1", "v0.2.0", "main"]
    assert [each["preferred"] for each in found] == [True, False, False, False]
    assert "https://example.org/docs/v0.10.0/" in (tmp_path / "index.html").read_text("utf-8")


def test_each_public_name_has_a_page(site):
    api, names = site("api"), site("names")

    pages = api._pages_of_names()
    found = names.public()
    expected = {f"{name}.rst" for name, x in found.items() if not inspect.ismodule(x)}
    assert pages.keys() == expected
    assert all(f"pyproelbo.{page.removesuffix('.rst')}" in text for page, text in pages.items())
