"""What tests of commands share."""

from __future__ import annotations

import pytest

from mamlpp_fast.cli import main


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    """Runs a command that must fail with status 2 and one line on standard error that has all of ``parts``."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    error = capsys.readouterr().err
    assert status == 2, error
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert error.splitlines()[-1] == lines[0]
    assert "Traceback" not in error
    for part in parts:
        assert part in lines[0]
