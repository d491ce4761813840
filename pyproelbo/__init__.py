"""See, weight and judge every part of an ELBO, for any Pyro model and guide."""

import ast as _ast
from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

__version__ = "0.2.0"

_HERE = _Path(__file__).parent

if not (_HERE / "models").is_dir() and (_HERE.parent / "models" / "__init__.py").is_file():
    # In a clone models/ and guides/ lie beside this folder, which there hides what is installed.
    __path__.append(str(_HERE.parent))


def _public(stub: _Path) -> dict[str, str]:
    """The module of each name in a list of imports, such as ``__init__.pyi``."""
    homes = {}
    for node in _ast.parse(stub.read_text(encoding="utf-8")).body:
        if not isinstance(node, _ast.ImportFrom):
            continue
        module = str(node.module)
        names = [alias.name for alias in node.names]
        if names == ["*"]:  # of a package that has a list of its own
            names = [*_public(_HERE / module.partition(".")[2] / "__init__.py")]
        homes |= dict.fromkeys(names, module)
    return homes


_HOMES = _public(_HERE / "__init__.pyi")
# Models, guides, data and what needs an extra are imported by their names alone, not by a star.
_APART = ("cli", "datasets", "guides", "lightning", "models")
__all__ = [name for name in _HOMES if name not in _APART]  # pyright: ignore


def __getattr__(name: str) -> _Any:
    """A public name, imported when it is asked for, for that takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home == __name__:
        return _import_module(f"{home}.{name}")
    value = globals()[name] = getattr(_import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
