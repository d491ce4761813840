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
    public = {name: getattr(pe, name) for name in dir(pe) if not name.startswith("_")}
    sections: dict[str, list[str]] = {}
    for kind in ("Objectives", "Figures", "Functions", "Classes"):
        members = {name: x for name, x in public.items() if _kind(name, x) == kind}
        sections[kind] = _lines(members, "pe.")
    for name in ("schedules", "priors", "sequences"):
        sections[f"`pe.{name}`"] = _lines(_members(public[name]), f"pe.{name}.")
    for name in ("datasets", "lightning"):
        module = importlib.import_module(f"pyproelbo.{name}")
        sections[f"`{module.__name__}`"] = _lines(_members(module), f"{module.__name__}.")
    for name in ("models", "guides"):
        sections[f"`pyproelbo.{name}`"] = _programs(f"pyproelbo.{name}")
    sections["`python -m pyproelbo`"] = _lines(_commands(), "python -m pyproelbo ")
    parts = ("\n".join([f"## {title}", "", *lines, ""]) for title, lines in sections.items())
    return "\n".join([OPENING, *parts])


def _kind(name: str, x: Any) -> str | None:
    """The section of a name of pyproelbo itself; None for a module."""
    if isinstance(x, ModuleType):
        return None
    if name.startswith("plot_"):
        return "Figures"
    if not inspect.isclass(x):
        return "Functions"
    return "Objectives" if issubclass(x, pe.TermsELBO) else "Classes"


def _members(module: ModuleType) -> dict[str, Any]:
    """Classes and functions of a module; of a package, those that it takes from its modules."""
    return {
        name: x
        for name, x in sorted(vars(module).items())
        if not name.startswith("_")
        and (inspect.isclass(x) or inspect.isfunction(x))
        and x.__module__.startswith(module.__name__)
    }


def _programs(package: str) -> list[str]:
    """The lines of the modules of a package, each with those of the nn.Modules that it defines."""
    lines = []
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        programs = {
            name: x
            for name, x in _members(module).items()
            if inspect.isclass(x) and issubclass(x, nn.Module)
        }
        if programs:
            lines += _lines({info.name: module}, f"{package}.")
            lines += ["  " + line for line in _lines(programs)]
    return lines


def _commands() -> dict[str, Any]:
    """The functions behind the commands, by their names."""
    from pyproelbo.cli.app import app

    functions = (command.callback for command in app.registered_commands)
    return {function.__name__: function for function in functions if function is not None}


def _lines(members: dict[str, Any], prefix: str = "") -> list[str]:
    """Each name, with the first line of its docstring; of Sphinx's references the names alone."""
    lines = []
    for name, x in members.items():
        docstring = inspect.getdoc(x)
        if not docstring:
            raise ValueError(f"{prefix}{name} has no docstring: give it one")
        first = docstring.partition("\n")[0].replace("``", "`")
        first = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", first)
        lines.append(f"- `{prefix}{name}`: {first}")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
