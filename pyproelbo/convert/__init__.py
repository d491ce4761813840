"""A fit handed to other libraries: ArviZ's groups, in an ``xarray.DataTree``."""

from pyproelbo.convert.svi import SkippedWarning as SkippedWarning
from pyproelbo.convert.svi import from_svi as from_svi
