"""JAX: ``jit`` of the gradient over all tasks.

ARGUMENT ``vmap`` takes the tasks together, ``map`` one after the other; with ``-patches`` every convolution is patches
times a matrix, the form that XLA is fastest with on a CPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench.peers.problem import STAGES, Problem
from bench.peers.worker import Step

jax.config.update("jax_default_matmul_precision", "highest")

Named = dict[str, Any]


def convolution(x: Any, weight: Any, patches: bool) -> Any:
    """3x3 with padding 1: images [n, H, W, I] and filters [O, I, 3, 3] to [n, H, W, O]."""
    if not patches:
        return lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC"))
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, -1) @ weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))


def max_pool(x: Any) -> Any:
    """2x2, the gradient to the first of the largest.

    ``max`` is not differentiated: its gradient compares x with its maximum, and XLA, which computes x once for each of
    the two and rounds it differently, then finds no equal (a gradient of 0/0) or loses some.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = (
        x.reshape(n, height // 2, 2, width // 2, 2, channels)
        .transpose(0, 1, 3, 5, 2, 4)
        .reshape(n, height // 2, width // 2, channels, 4)
    )
    return (x * jax.nn.one_hot(x.argmax(-1), 4, dtype=x.dtype)).sum(-1)


def conv4(weights: Named, x: Any, patches: bool) -> Any:
    """Logits for images [n, H, W, 1]."""
    for stage in range(STAGES):
        own = {kind: weights[f"blocks.{stage}.{kind}"] for kind in ("conv.weight", "conv.bias")}
        scale, shift = (weights[f"blocks.{stage}.norm.{kind}"] for kind in ("weight", "bias"))
        x = convolution(x, own["conv.weight"], patches) + own["conv.bias"]
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) * (scale * lax.rsqrt(var + 1e-5)) + shift
        x = jax.nn.leaky_relu(x, 0.01)
        x = max_pool(x)
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    return x @ weights["head.weight"].T + weights["head.bias"]


def loss_of(fast: Named, fixed: Named, x: Any, y: Any, patches: bool) -> Any:
    logs = jax.nn.log_softmax(conv4(fast | fixed, x, patches))
    return -jnp.take_along_axis(logs, y[:, None], 1).mean()


def build(problem: Problem, device: str, argument: str | None) -> Step:
    jax.config.update("jax_enable_x64", problem.weights["head.weight"].dtype == "float64")
    sizes, adapting = problem.sizes, problem.adapting()
    over, _, form = (argument or "vmap").partition("-")
    patches = form == "patches"

    def task_loss(own: Named, task: tuple[Any, ...]) -> Any:
        support_x, support_y, target_x, target_y = task
        fast, total = {name: own[name] for name in adapting}, 0.0
        for k, step_weight in enumerate(sizes.step_weights):
            fixed = {name: p[k] if p.ndim == 2 else p for name, p in own.items() if ".norm." in name}
            gradients = jax.grad(loss_of)(fast, fixed, support_x, support_y, patches)
            rates = own["rates"][:, k] if sizes.plus else [sizes.rate] * len(fast)
            fast = {name: p - r * gradients[name] for (name, p), r in zip(fast.items(), rates, strict=True)}
            if step_weight:
                total += step_weight * loss_of(fast, fixed, target_x, target_y, patches)
        return total

    def mean_loss(own: Named, batch: tuple[Any, ...]) -> Any:
        def one(task: tuple[Any, ...]) -> Any:
            return task_loss(own, task)

        return (jax.vmap(one)(batch) if over == "vmap" else lax.map(one, batch)).mean()

    place = jax.devices("gpu" if device.startswith("cuda") else "cpu")[0]
    support_x, support_y, target_x, target_y = problem.tasks
    batch = jax.device_put(
        (support_x.transpose(0, 1, 3, 4, 2), support_y, target_x.transpose(0, 1, 3, 4, 2), target_y), place
    )
    own = jax.device_put(problem.weights, place)
    function = jax.jit(jax.value_and_grad(mean_loss))

    def step():  # type: ignore[no-untyped-def]
        return jax.block_until_ready(function(own, batch))

    return step
