"""One self-contained HTML page about one run or several: figures, their tables, confusions, settings."""

from mamlpp_fast.report.write import write_report

__all__ = ["write_report"]
