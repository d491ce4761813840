"""See, weight and judge every part of an ELBO, for any Pyro model and guide."""

import ast as _ast
import sys as _sys
from importlib import import_module as _import_module
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import Any as _Any

__version__ = "0.1.0"

_HERE = _Path(__file__).parent

if not (_HERE / "models").is_dir() and (_HERE.parent / "models" / "__init__.py").is_file():
    # In a clone models/ and guides/ lie beside this folder, which there hides what is installed.
    __path__.append(str(_HERE.parent))

_HOMES = {  # the module of each public name: the list is in __init__.pyi
    alias.name: str(node.module)
    for node in _ast.parse((_HERE / "__init__.pyi").read_text(encoding="utf-8")).body
    if isinstance(node, _ast.ImportFrom)
    for alias in node.names
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(_ModuleType):
    """A package of which some functions are called like the modules that they are in."""

    def __setattr__(self, name: str, value: _Any) -> None:
        """Set an attribute; where an import sets a module that hides a function, that function."""
        if isinstance(value, _ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> _Any:
    """A public name or a module, imported when it is asked for, for that takes seconds."""
    if name in _HOMES and _HOMES[name] != __name__:
        value = globals()[name] = getattr(_import_module(_HOMES[name]), name)
        return value
    if not name.startswith("_"):
        try:
            return _import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


_sys.modules[__name__].__class__ = _Package
