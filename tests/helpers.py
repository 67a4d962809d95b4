"""Small networks and tasks that several test files share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast.engine.fingerprint import Fingerprint, look
from mamlpp_fast.engine.fused.fusions import fuse
from mamlpp_fast.engine.fused.lowering import lower
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.steps import SquaredError
from mamlpp_fast.engine.record import record


def random_batch(
    *,
    tasks: int = 2,
    ways: int = 3,
    shots: int = 2,
    targets: int = 2,
    channels: int = 1,
    size: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> mf.EpisodeBatch:
    """Class-major tasks of noise around one random image a class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(tasks, ways, 1, channels, size, size, generator=generator, dtype=dtype)

    def side(count: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(tasks, ways, count, channels, size, size, generator=generator, dtype=dtype)
        return prototypes + noise, torch.arange(ways).view(1, ways, 1).expand(tasks, ways, count)

    return mf.EpisodeBatch(*side(shots), *side(targets))


def noise(*shape: int, images: int = 6, ways: int = 3, seed: int = 0) -> mf.EpisodeBatch:
    """Two tasks of random examples of this shape, the classes in turn, in support and targets alike; float64."""
    generator = torch.Generator().manual_seed(seed)
    x, q = (torch.randn(2, images, *shape, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.arange(images).remainder(ways).repeat(2, 1)
    return mf.EpisodeBatch(x, labels, q, labels)


def moved(
    loss: Tensor, weights: dict[str, Tensor], rate: float, second_order: bool = True
) -> dict[str, Tensor]:
    """The weights after a textbook's step on a loss of them, differentiable; what takes no part in it stays."""
    grads = torch.autograd.grad(loss, list(weights.values()), create_graph=second_order, allow_unused=True)
    return {n: p if g is None else p - rate * g for (n, p), g in zip(weights.items(), grads, strict=True)}


def maml_loss(
    call: Callable[[Any, dict[str, Tensor], tuple[Any, ...]], Tensor],
    model: nn.Module,
    task: tuple[Tensor, ...],
    rate: float = 0.1,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    second_order: bool = True,
) -> Tensor:
    """The loss on a task's targets after two of a textbook's steps, the model called as ``functional_call`` is."""
    x, y, target_x, target_y = task
    fast: dict[str, Tensor] = dict(model.named_parameters())
    for _ in range(2):
        fast = moved(loss_fn(call(model, fast, (x,)), y), fast, rate, second_order)
    return loss_fn(call(model, fast, (target_x,)), target_y)


def form_of(model: nn.Module) -> Fingerprint:
    return look(model)[0]


def jittered(model: nn.Module) -> nn.Module:
    """In float64, with every parameter off the value that would hide an error."""
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.1)
    return model


def small_conv4(steps: int = 3, *, seed: int = 0, **changes: object) -> mf.Conv4:
    """A two-stage Conv4, :func:`jittered`."""
    torch.manual_seed(seed)
    arguments = {"image_size": 12, "filters": 4, "stages": 2, "num_steps": steps} | changes
    return jittered(mf.Conv4(1, 3, **arguments))  # type: ignore[arg-type, return-value]


def small_learner(
    config: mf.MAMLConfig | None = None, *, engine: str = "reference", verify: bool = True, **changes: object
) -> mf.MAMLPlusPlus:
    """A float64 learner on :func:`small_conv4`, with rates that differ by tensor and step."""
    config = mf.MAMLConfig(steps=3) if config is None else config
    model = small_conv4(config.steps, per_step_affine=config.bnwb, per_step_stats=config.bnrs, **changes)
    learner = mf.MAMLPlusPlus(model, config, engine=engine, precision="float64", verify=verify)  # type: ignore[arg-type]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        rates = learner.rates.rates
        rates.add_(torch.rand(rates.shape, generator=generator, dtype=rates.dtype) * 0.05)
    return learner


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients by parameter name."""
    return {
        f"{i}.{name}": p.grad.clone()
        for i, module in enumerate(modules)
        for name, p in module.named_parameters()
        if p.grad is not None
    }


@contextlib.contextmanager
def kept_threads() -> Iterator[None]:
    """Afterwards torch has the number of threads that it had before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def assert_equal_on_any_threads(run: Callable[[], object]) -> None:
    """Compares the results on 1, 2 and 4 threads, bit for bit."""
    results = []
    with kept_threads():
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(run())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def lowered(model: nn.Module, example: tuple[int, ...], adapted: tuple[str, ...] = ()) -> Network:
    """The network of a model in training mode, without the loss."""
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x, other = (torch.randn(n, *example, generator=generator, dtype=dtype) for n in (3, 4))
    return fuse(lower(record(model.train(), x, other), model, frozenset(adapted)), SquaredError())


def spare_the_interpreter(backend: str, needless: bool) -> None:
    """Skips what another case covers where it is Triton's interpreter, which takes 0.1 s a launch."""
    if backend == "triton" and needless:
        pytest.skip("covered by another case; too long for the interpreter")


@contextlib.contextmanager
def refused(kind: type[Exception], text: str) -> Iterator[None]:
    """Within it an error of this kind is raised, of one line with this text in it."""
    with pytest.raises(kind) as raised:
        yield
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def run_elsewhere(file: str, *arguments: str, **variables: str) -> None:
    """Runs a test file as a script in a process of its own, which has these variables in its environment."""
    done = subprocess.run(
        [sys.executable, file, *arguments],
        env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
