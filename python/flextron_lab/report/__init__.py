"""Pages of figures about an elastic checkpoint or the study, each one HTML file that requests nothing."""

from flextron_lab.report.checkpoint import report
from flextron_lab.report.page import Section, render

__all__ = ["Section", "render", "report"]
