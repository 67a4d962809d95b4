"""Scripts of learn2learn's users, to run with its import and with ours: the text as it is, its import lines changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import mamlpp_fast.compat.learn2learn as ours
from bench.peers.learn2learn_source import load
from bench.peers.problem import Problem
from bench.peers.worker import Step

__all__ = ["ITERATIONS", "SCRIPTS", "build", "errors", "run"]

FOLDER = Path(__file__).parent
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "MAML": ("maml.py", {}),
    "MAML, a network of one's own": ("maml.py", {"own": True}),
    "FOMAML": ("maml.py", {"first_order": True}),
    "Meta-SGD": ("maml.py", {"learner": "meta-sgd", "own": True}),
    "ANIL": ("anil.py", {}),
    "ANIL, Kronecker-factored": ("anil.py", {"kronecker": True}),
}
ITERATIONS = 4
"""Meta-iterations of a script that is timed, behind setting up, which a user's script does once for thousands."""
_IMPORT = re.compile(r"^(import|from) learn2learn\b", re.MULTILINE)

Results = dict[str, list[Tensor]]


@cache
def drawings(dtype: str) -> tuple[Tensor, Tensor]:
    """Images [20 · 5, 1, 28, 28] of a blurred prototype a class and noise, and their labels."""
    generator, classes, each = torch.Generator().manual_seed(0), 20, 5
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


def build(problem: Problem, device: str, argument: str | None) -> Step:
    """The script ``NAME:before`` or ``NAME:after``, as a peer's step: setting up, then tasks and Adam.

    In float32 as often as :data:`ITERATIONS` says, to be timed; in float64 once, to be compared: a second iteration
    starts where Adam has made steps of the rounding that a bias in front of batch norm has for a gradient.

    What it computes: the losses' sum; meta-gradients, accuracies and buffers.
    """
    name, _, which = str(argument).partition(":")
    library = ours if which == "after" else load()
    sizes = {"tasks": problem.sizes.tasks, "ways": problem.sizes.ways, "hidden": problem.sizes.filters}
    dtype = str(problem.tasks[0].dtype)
    iterations = 1 if dtype == "float64" else ITERATIONS

    def step() -> tuple[Tensor, Mapping[str, Any]]:
        found = run(name, library, dtype=dtype, iterations=iterations, **sizes)
        kept = ("meta-gradients", "accuracies", "buffers")
        return torch.stack(found["losses"]).sum(), {
            f"{what}.{i}": t for what in kept for i, t in enumerate(found[what])
        }

    return step
