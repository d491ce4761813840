"""Write names.md, the public names with a line each, from the first lines of their docstrings."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

import pyproelbo as pe

PAGE = Path(__file__).parent / "names.md"
OPENING = """\
# Public names

Made by `python tutorials/names.py` from the first line of each docstring; `help(name)` has the
rest.
`pe` is `import pyproelbo as pe`.
"""


def page() -> str:
    """The text of names.md."""
    sections = {kind: _lines(found, "pe.") for kind, found in of_pyproelbo().items()}
    for name in ("schedules", "priors", "sequences"):
        sections[f"`pe.{name}`"] = _lines(members(public()[name]), f"pe.{name}.")
    for name in ("datasets", "lightning"):
        module = importlib.import_module(f"pyproelbo.{name}")
        sections[f"`{module.__name__}`"] = _lines(members(module), f"{module.__name__}.")
    for name in ("models", "guides"):
        sections[f"`pyproelbo.{name}`"] = _programs(f"pyproelbo.{name}")
    sections["`python -m pyproelbo`"] = _lines(_commands(), "python -m pyproelbo ")
    parts = ("\n".join([f"## {title}", "", *lines, ""]) for title, lines in sections.items())
    return "\n".join([OPENING, *parts])


def public() -> dict[str, Any]:
    """What pyproelbo itself has."""
    return {name: getattr(pe, name) for name in dir(pe) if not name.startswith("_")}


def of_pyproelbo() -> dict[str, dict[str, Any]]:
    """The same by sections, but for modules."""
    kinds = ("Objectives", "Figures", "Functions", "Classes", "Warnings")
    found = public()
    return {kind: {n: x for n, x in found.items() if _kind(n, x) == kind} for kind in kinds}


def _kind(name: str, x: Any) -> str | None:
    """The section of a name of pyproelbo itself; None for a module."""
    if isinstance(x, ModuleType):
        return None
    if name.startswith("plot_"):
        return "Figures"
    if not inspect.isclass(x):
        return "Functions"
    if issubclass(x, Warning):
        return "Warnings"
    return "Objectives" if issubclass(x, pe.TermsELBO) else "Classes"


def members(module: ModuleType) -> dict[str, Any]:
    """Classes and functions of a module; of a package, those that it takes from its modules."""
    return {
        name: x
        for name, x in sorted(vars(module).items())
        if not name.startswith("_")
        and (inspect.isclass(x) or inspect.isfunction(x))
        and x.__module__.startswith(module.__name__)
    }


def programs(package: str) -> dict[str, dict[str, Any]]:
    """The modules of a package that define some, each with its nn.Modules."""
    found = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        name = f"{package}.{info.name}"
        of_module = {
            member: x
            for member, x in members(importlib.import_module(name)).items()
            if inspect.isclass(x) and issubclass(x, nn.Module)
        }
        if of_module:
            found[name] = of_module
    return found


def _programs(package: str) -> list[str]:
    lines = []
    for name, of_module in programs(package).items():
        lines += _lines({name.rpartition(".")[2]: importlib.import_module(name)}, f"{package}.")
        lines += ["  " + line for line in _lines(of_module)]
    return lines


def _commands() -> dict[str, Any]:
    """The functions behind the commands, by their names."""
    from pyproelbo.cli.app import app

    functions = (command.callback for command in app.registered_commands)
    return {function.__name__: function for function in functions if function is not None}


def _lines(named: dict[str, Any], prefix: str = "") -> list[str]:
    """Each name, with the first line of its docstring."""
    return [f"- `{prefix}{name}`: {first_line(x)}" for name, x in named.items()]


def first_line(x: object) -> str:
    """That of a docstring; of Sphinx's references the names alone."""
    docstring = inspect.getdoc(x)
    if not docstring:
        raise ValueError(f"{x!r} has no docstring: give it one")
    first = docstring.partition("\n")[0].replace("``", "`")
    return re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", first)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
