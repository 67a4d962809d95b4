"""Trains the runs of a table, one after the other, and writes the table after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mamlpp_fast.engine import EngineName, Precision
from mamlpp_fast.report import write_report
from mamlpp_fast.report.runs import read_run
from mamlpp_fast.reproduce.experiments import Cell, cells
from mamlpp_fast.reproduce.tables import Outcome, as_json, as_markdown
from mamlpp_fast.train import train
from mamlpp_fast.train.files import write_json, write_whole

__all__ = ["reproduce"]


def reproduce(
    table: str,
    *,
    out: str | Path,
    scale: float = 1.0,
    seeds: int = 3,
    shots: Sequence[int] = (1,),
    rows: Sequence[str] | None = None,
    protocol: str = "paper",
    settings: Mapping[str, Any] | None = None,
    data_path: str | Path | None = None,
    engine: EngineName = "auto",
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> str:
    """Runs every row over seeds 0 .. ``seeds`` - 1 and returns the table.

    A finished run is not run again and an unfinished one goes on, so the same call may be stopped and repeated.
    ``out`` holds ``table.md``, ``table.json``, ``runs/ROW-SHOTSshot-seedN/`` and, where plotly is installed,
    ``report.html``.

    Args:
        table: see :func:`mamlpp_fast.reproduce.experiments.cells`, as for scale, shots, rows, protocol and settings.
        out: the folder.
        scale: ditto.
        seeds: independent runs a row: seeds of initialisation and of training tasks both differ.
        shots: ditto.
        rows: ditto.
        protocol: ditto.
        settings: ditto.
        data_path: where the data set lies.
        engine: see :func:`mamlpp_fast.train.train`, as for precision and device.
        precision: ditto.
        device: ditto.
        quiet: print nothing.

    Raises:
        ValueError: for arguments out of range, or where ``out`` holds runs of other settings.
        mamlpp_fast.train.Interrupted: after SIGINT or SIGTERM, with everything saved.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    chosen = cells(table, scale=scale, shots=shots, rows=rows, protocol=protocol, settings=settings)
    folder = Path(out)
    results: dict[Cell, list[Outcome]] = {}
    folders = []
    # A seed of every row before the next seed: a table cut short still compares.
    for seed in range(seeds):
        for cell in chosen:
            run = folder / "runs" / f"{cell.name}-seed{seed}"
            if not quiet:
                print(f"\n{run.name}", flush=True)
            fault = None
            try:
                train(
                    replace(cell.config, seed=seed),
                    out=run,
                    preset=cell.preset,
                    data_path=data_path,
                    engine=engine,
                    precision=precision,
                    device=device,
                    quiet=quiet,
                )
            except ArithmeticError as error:
                fault = str(error)
            found = read_run(run)
            results.setdefault(cell, []).append(Outcome(seed, found.summary, found.epochs, fault))
            folders.append(run)
            done = list(results.items())
            write_json(folder / "table.json", as_json(table, scale, protocol, done))
            write_whole(folder / "table.md", as_markdown(table, scale, protocol, done).encode())
    if find_spec("plotly") is not None:
        write_report(folders, folder / "report.html", tasks=0)
    return as_markdown(table, scale, protocol, list(results.items()))
