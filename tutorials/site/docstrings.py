"""Docstrings, which are plain text with formulas, as reStructuredText."""

import re
from typing import Any

from formulas import latex
from sphinx.application import Sphinx

_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields|Keys):$")
FORMULA = re.compile(r"^[A-Za-z]\w*(?:\([\w, ]+\))? = ")
PROSE = re.compile(r", (?=(?:with|where|as|KL_z summed)\b)")  # after the formula of a first line
_LITERAL = re.compile(r"(``.+?``|:\w+:`[^`]+`|`[^`]+`|\*\w[^*]*\w\*)")


def setup(app: Sphinx) -> dict[str, Any]:
    """Be an extension of Sphinx: docstrings are converted as they are read."""
    app.connect("autodoc-process-docstring", _process, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _process(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    lines[:] = converted(lines)
    if what in ("property", "attribute") and lines:  # where napoleon takes "a: b" for a type
        lines[0] = lines[0].replace(": ", " \N{EM DASH} ", 1)


def converted(lines: list[str]) -> list[str]:
    """The lines with formulas as such, and with no mark-up that is none."""
    found: list[str] = []
    if lines and FORMULA.match(lines[0]):
        formula, *rest = PROSE.split(lines[0], maxsplit=1)
        found += _display([formula.rstrip(".")])
        if rest:
            found += [_escaped(rest[0][:1].upper() + rest[0][1:])]
        lines = lines[1:]
    blocks = _blocks(lines)
    in_section = False
    for i, block in enumerate(blocks):
        before = next((b for b in reversed(blocks[:i]) if b[0].strip()), [""])[-1]
        first = block[0]
        if _SECTION.match(first):
            in_section = True
        elif first and not first.startswith(" "):
            in_section = False
        is_literal = before.rstrip().endswith("::")
        if any(line.lstrip().startswith((">>>", "...")) for line in block) or is_literal:
            found += block
        elif first.startswith("    ") and not in_section:
            found += _display([line.strip().rstrip(",:") for line in block])
        else:
            found += [_escaped(line) for line in block]
    return found


def _blocks(lines: list[str]) -> list[list[str]]:
    """Lines that follow each other, with blank lines as blocks of their own."""
    blocks: list[list[str]] = []
    for line in lines:
        if line.strip() and blocks and blocks[-1][0].strip():
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks


def _display(formulas: list[str]) -> list[str]:
    return ["", ".. math::", "", "    " + r" \\ ".join(map(latex, formulas)), ""]


def _escaped(line: str) -> str:
    line = re.sub(r"(: )([A-Za-z]\.)$", r"\1\\\2", line)  # "S." alone would begin a list
    parts = _LITERAL.split(line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(\||\*|(?<=\w)_(?!\w))", r"\\\1", parts[i])
    return "".join(parts)
