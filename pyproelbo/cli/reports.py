"""The report of a fit, for each model."""

from pyproelbo.cli.report import Report
from pyproelbo.cli.row_report import RowReport
from pyproelbo.cli.sequence_report import SequenceReport

REPORTS: dict[str, type[Report]] = {"vae": RowReport, "dmm": SequenceReport}
