"""Results as files: numbers and text, without pickle."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from pyproelbo._files import whole_file
from pyproelbo._results.merging import stamped
from pyproelbo._results.origin import Origin, Simulations
from pyproelbo._results.result import Result

_TREE = "result"
_PLAIN = (bool, int, float, str, type(None))
# classes in results that are no public names
_OTHERS = {
    "Automatic": "_fitting.automatic",
    "ByTime": "_terms.by_time",
    "DataDraws": "_surgery.draws",
    "Estimate": "_evidence.decompositions",
    "LocalLatents": "_surgery.local_latents",
    "Plate": "_terms.traces",
    "PosteriorSums": "_surgery.part",
    "Usage": "priors.usage",
}


def save(result: Result, path: str | Path) -> None:
    """Write a result to a file (see :meth:`Result.save`)."""
    arrays: dict[str, np.ndarray] = {}
    tree = _written(result, arrays, type(result).__name__)
    arrays[_TREE] = np.array(json.dumps(tree))
    with whole_file(Path(path)) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_result(path: str | Path) -> Result:
    """A result from the file that :meth:`Result.save` has written.

    Only numbers and text are read: a file can run no code.

    Raises:
        ValueError: for a file that is not of a result, or of a later version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        found = _read(json.loads(str(arrays[_TREE])), arrays)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, BadZipFile) as error:
        raise ValueError(
            f"{path} is no file of a result, or of a later version of pyproelbo: {error}"
        ) from error
    if not isinstance(found, Result):
        raise ValueError(f"{path} is no file of a result")
    return found


def _written(value: Any, arrays: dict[str, np.ndarray], where: str) -> Any:
    """The value as JSON, its arrays by name."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor | np.ndarray):
        kind, array = ("array", value) if isinstance(value, np.ndarray) else _bits(value)
        if array.dtype != object:
            arrays[where] = array
            return {kind: where}
    elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        each = {key: _written(v, arrays, f"{where}.{key}") for key, v in value.items()}
        return {"mapping": each}
    elif is_dataclass(value) or hasattr(value, "_fields"):
        is_tuple = isinstance(value, tuple)
        names = value._fields if is_tuple else [f.name for f in fields(value)]  # type: ignore[attr-defined]
        each = {name: _written(getattr(value, name), arrays, f"{where}.{name}") for name in names}
        tree: dict[str, Any] = {"class": type(value).__name__, "fields": each}
        if isinstance(value, Result) and value.origin is not None:
            tree["origin"] = value.origin._asdict()
        _class(type(value).__name__, type(value))
        return tree
    elif isinstance(value, tuple | list | frozenset):
        each = [_written(v, arrays, f"{where}.{i}") for i, v in enumerate(value)]
        return {type(value).__name__: each}
    raise ValueError(f"{where} is of numbers and text no more: {value!r} cannot be saved")


def _bits(value: Tensor) -> tuple[str, np.ndarray]:
    """A tensor as an array; of a dtype that NumPy has not, its bits."""
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        return "bfloat16", value.contiguous().view(torch.int16).numpy()
    return "tensor", value.numpy()


def _read(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "class" in tree:
        values = {name: _read(value, arrays) for name, value in tree["fields"].items()}
        found = _class(tree["class"])(**values)
        return stamped(found, _origin(tree["origin"])) if "origin" in tree else found
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return torch.from_numpy(arrays[value])
    if kind == "bfloat16":
        return torch.from_numpy(arrays[value]).view(torch.bfloat16)
    if kind == "array":
        return arrays[value]
    if kind == "mapping":
        return {name: _read(each, arrays) for name, each in value.items()}
    several = {"tuple": tuple, "list": list, "frozenset": frozenset}[kind]
    return several(_read(each, arrays) for each in value)


def _origin(values: Mapping[str, Any]) -> Origin | Simulations:
    if "seeds" in values:
        return Simulations(tuple(values["seeds"]), values["programs"])
    return Origin(**values)


def _class(name: str, expected: type | None = None) -> Any:
    """The class of the library with a name: of results, and of what is in them."""
    where = f"pyproelbo.{_OTHERS[name]}" if name in _OTHERS else "pyproelbo"
    found = getattr(import_module(where), name, None)
    is_known = isinstance(found, type) and (is_dataclass(found) or hasattr(found, "_fields"))
    if not is_known or expected not in (None, found):
        raise ValueError(f"a {name} cannot be saved, nor read: it is no result of pyproelbo")
    return found
