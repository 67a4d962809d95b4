"""The task-batched head against autograd through F.linear and F.cross_entropy, orders one and two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.ops._library import OPERATIONS
from mamlpp_fast.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_tangent,
    linear_cross_entropy_tangent,
)

SHAPES = {
    "omniglot": (3, 20, 64, 20),
    "primes": (2, 7, 5, 3),
    "one-image": (1, 1, 4, 2),
    "one-class": (2, 3, 2, 1),
}


def fresh(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["mild", "saturated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_four_orders(shape: tuple[int, int, int, int], scale: float) -> None:
    tasks, images, features, classes = shape
    parameters = [
        torch.randn(s, dtype=torch.float64).mul_(scale if len(s) == 2 else 1.0).requires_grad_()
        for s in ((tasks, images, features), (tasks, classes, features), (tasks, classes))
    ]
    tangents = [torch.randn_like(p) for p in parameters]
    labels = torch.randint(classes, (tasks, images))

    def losses(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.stack(
            [F.cross_entropy(F.linear(*head), y) for *head, y in zip(f, weight, bias, labels, strict=True)]
        )

    expected = losses(*parameters)
    gradients = torch.autograd.grad(expected.sum(), parameters, create_graph=True)
    products = torch.autograd.grad(gradients, parameters, tangents)

    f, weight, bias = (p.detach() for p in parameters)
    logits, probabilities, gz, z_dot, gz_dot = (fresh(tasks, images, classes) for _ in range(5))
    loss = linear_cross_entropy(f, weight, bias, labels, logits, probabilities, fresh(tasks))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        logits, torch.einsum("tnf,tof->tno", f, weight) + bias[:, None], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(probabilities, logits.softmax(-1), rtol=1e-12, atol=1e-12)

    found = [fresh(*p.shape) for p in parameters]
    linear_cross_entropy_backward(f, weight, labels, probabilities, gz, *found)
    torch.testing.assert_close(found, [g.detach() for g in gradients], rtol=1e-12, atol=1e-12)

    f_dot, weight_dot, bias_dot = tangents
    linear_cross_entropy_tangent(f_dot, weight_dot, bias_dot, f, weight, z_dot)
    found = [fresh(*p.shape) for p in parameters]
    linear_cross_entropy_backward_tangent(
        z_dot, f_dot, weight_dot, f, weight, probabilities, gz, gz_dot, *found
    )
    torch.testing.assert_close(found, list(products), rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    f, weight, bias = torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.randn(2, 3)
    labels = torch.randint(3, (2, 5))
    z = [torch.rand(2, 5, 3) for _ in range(4)]
    out = (torch.empty(2, 5, 3), torch.empty_like(f), torch.empty_like(weight), torch.empty_like(bias))
    samples = {
        "linear_cross_entropy": (f, weight, bias, labels, *z[:2], torch.empty(2)),
        "linear_cross_entropy_backward": (f, weight, labels, z[0], *out),
        "linear_cross_entropy_tangent": (f, weight, bias, f, weight, z[0]),
        "linear_cross_entropy_backward_tangent": (z[0], f, weight, f, weight, z[1], z[2], *out),
    }
    for name, sample in samples.items():
        torch.library.opcheck(OPERATIONS[name].overload, sample)


def test_errors_name_the_argument() -> None:
    f, weight, bias, labels = (
        torch.randn(2, 5, 4),
        torch.randn(2, 3, 4),
        torch.randn(2, 3),
        torch.zeros(2, 5).long(),
    )
    out = (torch.empty(2, 5, 3), torch.empty(2, 5, 3), torch.empty(2))
    with pytest.raises(ValueError, match="f, weight: expected"):
        linear_cross_entropy(f[0], weight, bias, labels, *out)
    with pytest.raises(ValueError, match="bias: expected"):
        linear_cross_entropy(f, weight, bias[:, :2], labels, *out)
    with pytest.raises(ValueError, match="labels: expected"):
        linear_cross_entropy(f, weight, bias, labels[:, :2], *out)
    with pytest.raises(TypeError, match=r"labels: expected torch\.int64"):
        linear_cross_entropy(f, weight, bias, labels.int(), *out)
