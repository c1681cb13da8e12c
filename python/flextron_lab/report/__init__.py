"""Pages to look at: figures of an elastic checkpoint or of the study in one HTML file that asks nobody for anything."""

from flextron_lab.report.checkpoint import report
from flextron_lab.report.page import Section, render

__all__ = ["Section", "render", "report"]
