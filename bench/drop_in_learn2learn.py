"""Scripts of learn2learn's users with its import, and with ours: the same numbers, then the times of both.

    python -m bench.peers.environments --only learn2learn       # once
    ENVIRONMENT/bin/python -m bench.drop_in_learn2learn [--seconds 20] [--json FILE]

`ENVIRONMENT` is `~/.cache/mamlpp_fast/peers/learn2learn`. The text of a script is executed twice: as it is, and with
`learn2learn` replaced in its import lines. Losses, accuracies, meta-gradients, buffers and the parameters after three
Adam steps must agree in float64 before any time is taken. Times are of a meta-iteration in float32: tasks drawn and
loaded, gradients and Adam's step, and setting up, which takes a hundredth of it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import mamlpp_fast.compat.learn2learn as ours
from bench.harness import before_after, interleaved, keep
from bench.peers.learn2learn_source import load

__all__ = ["SCRIPTS", "errors", "run"]

FOLDER = Path(__file__).parent / "learn2learn_scripts"
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "MAML": ("maml.py", {}),
    "MAML, a network of one's own": ("maml.py", {"own": True}),
    "FOMAML": ("maml.py", {"first_order": True}),
    "Meta-SGD": ("maml.py", {"learner": "meta-sgd", "own": True}),
    "ANIL": ("anil.py", {}),
    "ANIL, Kronecker-factored": ("anil.py", {"kronecker": True}),
}
_TOLERANCE = 1e-6
_IMPORT = re.compile(r"^(import|from) learn2learn\b", re.MULTILINE)

Results = dict[str, list[Tensor]]


@cache
def drawings(dtype: str, classes: int = 20, each: int = 5) -> tuple[Tensor, Tensor]:
    """Images [classes · each, 1, 28, 28] of a blurred prototype a class and noise, and their labels."""
    generator = torch.Generator().manual_seed(0)
    prototypes = (
        torch.rand(classes, 1, 1, 7, 7, generator=generator).expand(-1, each, -1, -1, -1).flatten(0, 1)
    )
    images = torch.nn.functional.interpolate(prototypes, size=28, mode="bilinear")
    images = images + 0.2 * torch.randn(images.shape, generator=generator)
    return images.to(getattr(torch, dtype)), torch.arange(classes).repeat_interleave(each)


@cache
def _main(file: str, ours_too: bool) -> Any:
    text = (FOLDER / file).read_text()
    if ours_too:
        text = _IMPORT.sub(r"\1 mamlpp_fast.compat.learn2learn", text)
    scope: dict[str, Any] = {"__name__": f"learn2learn_scripts.{file}"}
    exec(compile(text, file, "exec"), scope)
    return scope["main"]


def run(script: str, library: ModuleType, *, dtype: str, **sizes: Any) -> Results:
    """What a script returns under ``library``, learn2learn as loaded or ours."""
    file, settings = SCRIPTS[script]
    results: Results = _main(file, library is ours)(*drawings(dtype), **settings, **sizes)
    return results


def errors(results: Results, expected: Results) -> dict[str, float]:
    """The largest difference of each result, relative to its largest value."""

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.double().flatten() for t in tensors] or [torch.zeros(1).double()])

    return {
        name: float(
            (flat(results[name]) - flat(tensors)).abs().max() / flat(tensors).abs().max().clamp_min(1e-12)
        )
        for name, tensors in expected.items()
    }


def measure(script: str, original: ModuleType, seconds: float, sizes: dict[str, Any]) -> dict[str, Any]:
    """A row: errors in float64 and, if they are small enough, the times in float32."""
    both = [run(script, m, dtype="float64", iterations=3, **sizes) for m in (ours, original)]
    found = errors(*both)
    error = max(found.values())
    row: dict[str, Any] = {"script": script, **sizes, "errors_float64": found, "largest_error_float64": error}
    if not error < _TOLERANCE:
        return row | {"fault": f"float64 error {error:.1e}"}

    def job(library: ModuleType) -> Any:
        return lambda: run(script, library, dtype="float32", **sizes)

    times = interleaved({"before": job(original), "after": job(ours), "again": job(ours)}, seconds)
    return row | before_after(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scripts", help="names, separated by semicolons", default=";".join(SCRIPTS))
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each script")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    original = load()
    rows: list[dict[str, Any]] = []
    for script in arguments.scripts.split(";"):
        sizes = {name: getattr(arguments, name) for name in ("tasks", "ways", "hidden")}
        rows.append(measure(script, original, arguments.seconds, sizes))
        print(json.dumps(rows[-1]), flush=True)
        keep(arguments.json, rows, before="learn2learn 0.2.0")
    return int(any("fault" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
