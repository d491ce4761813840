"""What the rows of a report depend on besides the data."""

from collections.abc import Iterable
from hashlib import sha256
from typing import TypeVar

import pyro
import torch
from torch import Tensor

from pyproelbo._results.merging import stamped
from pyproelbo._results.origin import Origin
from pyproelbo._results.result import Result
from pyproelbo._rows.evaluating import setting
from pyproelbo._rows.modules import modules_of

T = TypeVar("T")


def origin_here(start: int = 0, stop: int = 0) -> Origin | None:
    """Some rows of the current report; None where no report is being made."""
    around = setting()
    if around is None:
        return None
    return Origin(start, stop, around.seed or 0, _fingerprint(around.programs))


def of_rows(found: T, origin: Origin | None, start: int, stop: int) -> T:
    """The same, which knows its rows if it is a result with one for each datum."""
    if isinstance(found, Result) and origin is not None and getattr(found, "per", "") == "datum":
        return stamped(found, origin._replace(start=start, stop=stop))
    return found


def _fingerprint(programs: Iterable[object]) -> str:
    """The names of the programs and the values of their parameters, as a hash."""
    found = sha256()
    tensors: dict[str, Tensor] = {}
    for i, program in enumerate(programs):
        found.update(getattr(program, "__qualname__", type(program).__qualname__).encode())
        for j, module in enumerate(modules_of(program)):
            values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            tensors |= {f"{i}.{j}.{name}": value for name, value in values.items()}
    tensors |= pyro.get_param_store().get_state()["params"]
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(str(value.dtype).encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
