"""Objectives under Lightning: the extra ``lightning`` (``pip install pyproelbo[lightning]``)."""

try:
    import lightning.pytorch as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pyproelbo.lightning needs Lightning: pip install pyproelbo[lightning]"
    ) from error

from pyproelbo.lightning.data_of_processes import PartialDataWarning as PartialDataWarning
from pyproelbo.lightning.data_of_processes import RepeatedDataWarning as RepeatedDataWarning
from pyproelbo.lightning.task import ELBOTask as ELBOTask
from pyproelbo.lightning.task import UnfinishedScheduleWarning as UnfinishedScheduleWarning

__all__ = ["ELBOTask", "PartialDataWarning", "RepeatedDataWarning", "UnfinishedScheduleWarning"]
