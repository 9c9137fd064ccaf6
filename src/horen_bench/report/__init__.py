"""One self-contained page about all stored runs: tables, curves, single cases."""

from horen_bench.report.page import report
from horen_bench.report.runs import StoredRun, read

__all__ = ["StoredRun", "read", "report"]
