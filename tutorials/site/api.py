"""A page for each public name, an index of them, and llms.txt: written when a build begins.

The pages are in ``api/``, beside the tutorials, and no part of the repository.
"""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import gallery
import names
from docstrings import FORMULA, PROSE
from formulas import latex
from sphinx.application import Sphinx

import pyproelbo as pe

_MODULES = ("schedules", "priors", "sequences", "capture", "datasets", "lightning")
_PROGRAMS = ("models", "guides")


def setup(app: Sphinx) -> dict[str, Any]:
    """Be an extension of Sphinx: pages before a build, llms.txt after it."""
    app.connect("builder-inited", _write_pages)
    app.connect("build-finished", _write_llms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write_pages(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    gallery.draw()
    pages = {**_pages_of_names(), **_pages_of_modules()}
    pages["index.md"] = _index()
    for old in folder.glob("*.*"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _pages_of_names() -> dict[str, str]:
    return {
        f"{name}.rst": _heading(name) + _directive(f"pyproelbo.{name}", x) + _picture(name)
        for name, x in names.public().items()
        if not isinstance(x, ModuleType)
    }


def _pages_of_modules() -> dict[str, str]:
    pages = {}
    for name in _modules():
        module = importlib.import_module(name)
        text = _heading(name) + f".. automodule:: {name}\n\n"
        for member, x in names.members(module).items():
            text += _heading(member, "-") + _directive(f"{name}.{member}", x)
        pages[f"{name}.rst"] = text
    return pages


def _modules() -> list[str]:
    programs = [
        module for package in _PROGRAMS for module in names.programs(f"pyproelbo.{package}")
    ]
    return [f"pyproelbo.{name}" for name in _MODULES] + programs


def _heading(title: str, line: str = "=") -> str:
    return f"{title}\n{line * len(title)}\n\n"


def _directive(name: str, x: object) -> str:
    if not inspect.isclass(x):
        return f".. autofunction:: {name}\n\n"
    lines = [f".. autoclass:: {name}", ":members:", ":show-inheritance:"]
    if name.count(".") > 1 and any(x is other for other in names.public().values()):
        lines += [":no-index:"]  # it has a page of its own
    return "\n   ".join(lines) + "\n\n"


def _picture(name: str) -> str:
    path = gallery.picture_of(name)
    return f".. image:: pictures/{path.name}\n   :alt: {name}\n\n" if path.exists() else ""


def _index() -> str:
    """All names by their sections, each with its first line."""
    lines = ["# All names", "", "`pe` is `import pyproelbo as pe`.", ""]
    pages = []
    for section, found in names.of_pyproelbo().items():
        lines += [f"## {section}", "", "| name | what it is |", "|---|---|"]
        lines += [f"| [`pe.{name}`]({name}.rst) | {_first(x)} |" for name, x in found.items()]
        lines += [""]
        pages += list(found)
    lines += ["## Modules", "", "| name | what is in it |", "|---|---|"]
    for name in _modules():
        lines += [f"| [`{name}`]({name}.rst) | {_first(importlib.import_module(name))} |"]
    pages += _modules()
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *pages, "```", ""])


def _first(x: object) -> str:
    first = names.first_line(x)
    if FORMULA.match(first):
        formula = PROSE.split(first.rstrip("."), maxsplit=1)[0]
        formula = re.split(r", (?=\w+ = )", formula)[0]  # what its letters are is on the page
        math = latex(formula).replace("|", r"\vert ")
        return f"${math}$"
    return first.replace("|", "\\|")


def _write_llms(app: Sphinx, error: Exception | None) -> None:
    """A list of pages for language models (llmstxt.org)."""
    if error is not None or app.builder.format != "html":
        return
    lines = [f"# {app.config.project}", "", "> " + (pe.__doc__ or "").strip().splitlines()[0], ""]
    titles = {name: title.astext() for name, title in app.env.titles.items()}
    sections = {"Pages": "pages/", "How to": "how_to/", "Tutorials": "", "Names": "api/"}
    for section, folder in sections.items():
        lines += [f"## {section}", ""]
        for name, title in sorted(titles.items()):
            if name.startswith(folder) and (folder or re.match(r"\d\d_", name)):
                lines += [f"- [{title}]({name}.html)"]
        lines += [""]
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
