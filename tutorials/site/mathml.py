"""Formulas as MathML, which browsers draw by themselves: no scripts, and nothing to fetch."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

_SPELLINGS = {  # of what the converter does not know
    r"\\(begin|end)\{aligned\}": r"\\\1{align*}",
    r"(\\[bB]igg?[lr]?)\s*\\\|": "\\1\N{DOUBLE VERTICAL LINE}",
}


def setup(app: Sphinx) -> dict[str, Any]:
    """Be an extension of Sphinx: a renderer of formulas, "mathml"."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def mathml(latex: str, display: str = "inline") -> str:
    """A formula as MathML.

    Raises:
        ValueError: where some of it stays LaTeX.
    """
    text = latex
    if r"\\" in text and r"\begin" not in text:
        text = rf"\begin{{align*}}{text}\end{{align*}}"
    for pattern, spelling in _SPELLINGS.items():
        text = re.sub(pattern, spelling, text)
    found = convert(text, display=display)  # type: ignore[arg-type]
    if "\\" in found or "<mi>&amp;</mi>" in found or "<mo>&amp;</mo>" in found:
        raise ValueError(f"{latex!r} would not be drawn as it should: write it in simpler LaTeX")
    return found


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _display(translator: Any, node: nodes.math_block) -> None:
    found = mathml(node.astext(), "block")
    translator.body.append(f'<div class="math notranslate">{found}</div>')
    raise nodes.SkipNode
