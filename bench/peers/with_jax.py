"""JAX: ``jit`` of the gradient over all tasks; ARGUMENT ``vmap`` takes them together, ``map`` one after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench.peers.problem import STAGES, Problem
from bench.peers.worker import Step

jax.config.update("jax_default_matmul_precision", "highest")


def conv4(weights: dict[str, Any], x: Any) -> Any:
    """Logits for images [n, H, W, 1]."""
    for stage in range(STAGES):
        own = {kind: weights[f"blocks.{stage}.{kind}"] for kind in ("conv.weight", "conv.bias")}
        scale, shift = (weights[f"blocks.{stage}.norm.{kind}"] for kind in ("weight", "bias"))
        x = lax.conv_general_dilated(
            x, own["conv.weight"], (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        x = x + own["conv.bias"]
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) * (scale * lax.rsqrt(var + 1e-5)) + shift
        x = jax.nn.leaky_relu(x, 0.01)
        n, height, width, channels = x.shape
        x = x[:, : height // 2 * 2, : width // 2 * 2]
        x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    return x @ weights["head.weight"].T + weights["head.bias"]


def loss_of(fast: dict[str, Any], fixed: dict[str, Any], x: Any, y: Any) -> Any:
    logs = jax.nn.log_softmax(conv4(fast | fixed, x))
    return -jnp.take_along_axis(logs, y[:, None], 1).mean()


def build(problem: Problem, device: str, argument: str | None) -> Step:
    jax.config.update("jax_enable_x64", problem.weights["head.weight"].dtype == "float64")
    steps, rate = problem.sizes.steps, problem.sizes.rate

    def task_loss(fast: dict[str, Any], fixed: dict[str, Any], task: tuple[Any, ...]) -> Any:
        support_x, support_y, target_x, target_y = task
        for _ in range(steps):
            gradients = jax.grad(loss_of)(fast, fixed, support_x, support_y)
            fast = {name: p - rate * gradients[name] for name, p in fast.items()}
        return loss_of(fast, fixed, target_x, target_y)

    def mean_loss(own: dict[str, Any], batch: tuple[Any, ...]) -> Any:
        fixed = {name: p for name, p in own.items() if ".norm." in name}
        fast = {name: p for name, p in own.items() if name not in fixed}
        over = jax.vmap if argument == "vmap" else lambda f: lambda tasks: lax.map(f, tasks)
        return over(lambda task: task_loss(fast, fixed, task))(batch).mean()

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
