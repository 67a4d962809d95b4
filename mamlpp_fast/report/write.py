"""From run folders to a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mamlpp_fast.report.confusion import Confusions, confusions
from mamlpp_fast.report.content import all_figures
from mamlpp_fast.report.page import page
from mamlpp_fast.report.runs import read_runs
from mamlpp_fast.train.files import write_whole

__all__ = ["write_report"]


def write_report(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    tasks: int = 100,
    data_path: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Writes one HTML page about a run, or comparing several, that needs nothing but itself.

    Args:
        folders: the runs' folders.
        out: the page, whose folder is made; without it ``report.html`` in the folder of one run, in the current
            folder for several.
        tasks: test tasks over which confusions are counted; 0 for none.
        data_path: where the data set lies; where each run found it without it.
        device: where the confusions are computed.

    Returns:
        the page.

    Raises:
        ValueError: when a folder holds no run, or plotly is not installed.
        OSError: when the page cannot be written.
    """
    script = _plotly()
    runs = read_runs(folders)
    if out is None:
        out = runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html")
    found = [
        confusions(run.folder, tasks=tasks, data_path=data_path, device=device)
        if tasks
        else Confusions(reason="not asked for")
        for run in runs
    ]
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(runs, all_figures(runs), found, script).encode())
    return path


def _plotly() -> str:
    """plotly's script.

    Raises:
        ValueError: when plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(f"report: expected plotly, which comes with the package; {error}") from error
    script: str = get_plotlyjs()
    return script
