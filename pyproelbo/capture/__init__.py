"""Captured steps."""

from pyproelbo.capture.captured import Call, Replay
from pyproelbo.capture.options import Capture, CaptureWarning, as_capture
from pyproelbo.capture.records import Records
from pyproelbo.capture.steps import CapturedSteps

__all__ = ["Call", "Capture", "CaptureWarning", "CapturedSteps", "Records", "Replay", "as_capture"]
