"""The task-batched head in four orders, every backend, against autograd through F.linear and F.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_on_any_threads
from op_helpers import assert_errs_at_most_twice_as_much_as_pytorch, assert_orders, backend_fixture, opcheck
from torch import Tensor

from mamlpp_fast.testing import backends, use_backend

ops = torch.ops.mamlpp_fast
BACKENDS = backends("linear_cross_entropy")
backend = backend_fixture("linear_cross_entropy")
# Tasks, images, features, classes.
SHAPES = {
    "omniglot": (3, 20, 64, 20),
    "primes": (2, 37, 19, 5),
    "many-classes": (1, 3, 7, 33),
    "one-image": (1, 1, 4, 2),
    "one-class": (2, 3, 2, 1),
    "one-feature": (2, 5, 1, 3),
}
PARAMETERS = ("f", "weight", "bias")


class Case:
    """Inputs of all orders, and their results by the operations and by autograd."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        *,
        bias: bool = True,
        tangents: tuple[str, ...] = PARAMETERS,
        wanted: tuple[str, ...] = PARAMETERS,
        want_loss: bool = True,
        spread: float = 1.0,
        smoothing: float = 0.1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        tasks, images, features, classes = shape
        self.dtype, self.want_loss, self.smoothing = dtype, want_loss, smoothing
        self.logits = (tasks, images, classes)
        shapes = ((tasks, images, features), (tasks, features, classes), (tasks, classes))
        present = PARAMETERS if bias else PARAMETERS[:2]
        self.given = {
            name: torch.randn(s, dtype=dtype) * (spread if name == "weight" else 1.0)
            for name, s in zip(PARAMETERS, shapes, strict=True)
            if name in present
        }
        self.dots = {n: torch.randn_like(t) for n, t in self.given.items() if n in tangents}
        self.wanted = [n for n in present if n in wanted]
        self.labels = torch.randint(classes, (tasks, images))
        hot = F.one_hot(self.labels, classes).to(dtype)
        self.target = hot * (1 - smoothing) + smoothing / classes
        self.scale = torch.tensor(0.7 / images, dtype=dtype)

    def fresh(self, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=self.dtype)

    def like(self) -> dict[str, Tensor]:
        return {n: self.fresh(*self.given[n].shape) for n in self.wanted}

    def run(self) -> dict[str, Tensor]:
        logits, p, gz, gz_dot = (self.fresh(*self.logits) for _ in range(4))
        loss = self.fresh(self.logits[0]) if self.want_loss else None
        f, weight, bias = (self.given.get(n) for n in PARAMETERS)
        assert f is not None and weight is not None
        ops.linear_cross_entropy(f, weight, bias, self.target, self.scale, logits, p, gz, loss)
        grads, dots = self.like(), self.like()
        ops.linear_cross_entropy_backward(gz, f, weight, *(grads.get(n) for n in PARAMETERS))
        f_dot, weight_dot, bias_dot = (self.dots.get(n) for n in PARAMETERS)
        ops.linear_cross_entropy_tangent(f_dot, weight_dot, bias_dot, f, weight, p, self.scale, gz_dot)
        ops.linear_cross_entropy_backward_tangent(
            gz_dot, gz, f_dot, weight_dot, f, weight, *(dots.get(n) for n in PARAMETERS)
        )
        found = {"logits": logits, "p": p, "gz": gz, "gz_dot": gz_dot}
        found |= {} if loss is None else {"loss": loss}
        found |= {f"g{n}": t for n, t in grads.items()}
        return found | {f"g{n}_dot": t for n, t in dots.items()}

    def expected(self) -> dict[str, Tensor]:
        """By autograd; the Hessian being symmetric, a gradient's tangent is the gradient of <gradient, direction>."""
        given = {n: t.clone().requires_grad_() for n, t in self.given.items()}
        # A shift of the logits, whose gradient is theirs.
        shift = torch.zeros(self.logits, dtype=self.dtype, requires_grad=True)
        leaves = {**given, "z": shift}
        logits, losses = [], []
        for t in range(self.logits[0]):
            bias = given["bias"][t] if "bias" in given else None
            z = F.linear(given["f"][t], given["weight"][t].mT, bias) + shift[t]
            logits.append(z)
            share = F.cross_entropy(z, self.labels[t], label_smoothing=self.smoothing, reduction="sum")
            losses.append(share * self.scale)
        z, loss = torch.stack(logits), torch.stack(losses)
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()), create_graph=True)
        by_name = dict(zip(leaves, gradients, strict=True))
        product = sum(((by_name[n] * d).sum() for n, d in self.dots.items()), torch.zeros(()))
        if self.dots:
            dots = torch.autograd.grad(product, list(leaves.values()), allow_unused=True)
        else:
            dots = tuple(torch.zeros_like(t) for t in leaves.values())
        found = {"logits": z, "p": z.softmax(-1), "loss": loss}
        found |= {f"g{n}": g for n, g in by_name.items()}
        found |= {f"g{n}_dot": g for n, g in zip(leaves, dots, strict=True)}
        return {n: t.detach() for n, t in found.items() if t is not None}


@pytest.mark.parametrize("spread", [1.0, 300.0], ids=["mild", "saturated"])
@pytest.mark.parametrize("name", SHAPES)
def test_four_orders(backend: str, name: str, spread: float) -> None:
    assert_orders(Case(SHAPES[name], spread=spread, smoothing=0.1 if spread == 1.0 else 0.0), 1e-10)


PARTS = {
    "no-bias": {"bias": False},
    "head-only": {"tangents": ("weight", "bias"), "wanted": ("weight", "bias")},
    "features-only": {"tangents": ("f",), "wanted": ("f",)},
    "bias-only": {"tangents": ("bias",), "wanted": ("bias",)},
    "nothing-moves": {"tangents": (), "wanted": ("f", "weight")},
    "no-loss": {"want_loss": False},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_absent_parts(backend: str, parts: dict[str, tuple[str, ...]]) -> None:
    assert_orders(Case((2, 35, 9, 4), **parts), 1e-10)  # type: ignore[arg-type]


def test_float32_errs_at_most_twice_as_much_as_pytorch(backend: str) -> None:
    assert_errs_at_most_twice_as_much_as_pytorch(Case((2, 20, 64, 5), dtype=torch.float32))


@pytest.mark.skipif("native" not in BACKENDS, reason="no native library")
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_result_does_not_depend_on_threads(tasks: int) -> None:
    case = Case((tasks, 21, 70, 5), dtype=torch.float32)
    assert_equal_on_any_threads(case.run)


@pytest.mark.parametrize("absent", [False, True], ids=["all", "absent"])
def test_opcheck(absent: bool) -> None:
    case = Case((2, 5, 4, 3), dtype=torch.float32)
    f, weight, bias = case.given.values()
    u, v, b = (None, None, None) if absent else tuple(case.dots.values())
    z = [torch.rand(case.logits) for _ in range(4)]
    out = (torch.empty_like(f), torch.empty_like(weight), None if absent else torch.empty_like(bias))
    loss = None if absent else torch.empty(2)
    samples = {
        "linear_cross_entropy": (
            f, weight, None if absent else bias, case.target, case.scale, *z[:3], loss,
        ),
        "linear_cross_entropy_backward": (z[0], f, weight, *out),
        "linear_cross_entropy_tangent": (u, v, b, f, weight, z[0], case.scale, z[1]),
        "linear_cross_entropy_backward_tangent": (z[0], z[1], u, v, f, weight, *out),
    }  # fmt: skip
    opcheck(samples)


def test_errors_name_the_argument(backend: str) -> None:
    case = Case((2, 5, 4, 3))
    z = [case.fresh(*case.logits) for _ in range(3)]
    given = {**case.given, "target": case.target, "scale": case.scale}
    given |= dict(zip(("logits", "probabilities", "gz"), z, strict=True)) | {"loss": None}

    def attempt(**changes: Tensor) -> None:
        ops.linear_cross_entropy(**(given | changes))

    attempt()
    with pytest.raises(ValueError, match="f, weight: expected"):
        attempt(f=case.given["f"][0])
    with pytest.raises(ValueError, match=r"bias: expected (contiguous )?[([]2, 3[)\]]"):
        attempt(bias=case.given["bias"][:, :2])
    with pytest.raises(ValueError, match=r"target: expected (contiguous )?[([]2, 5, 3[)\]]"):
        attempt(target=case.target[:, :2])
    with pytest.raises(ValueError, match=r"scale: expected (contiguous )?[([][)\]]"):
        attempt(scale=case.scale[None])
    f, weight = case.given["f"], case.given["weight"]
    with pytest.raises(ValueError, match="gweight: expected"):
        ops.linear_cross_entropy_backward(z[0], f, weight, None, weight.mT, None)
    if backend != "python":
        with pytest.raises(TypeError, match="target: expected"):
            attempt(target=case.target.float())
        with pytest.raises(ValueError, match="f: expected"):
            attempt(f=f.mT.contiguous().mT)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no interpreter")
def test_too_many_classes_for_a_gpu() -> None:
    with use_backend("triton"), pytest.raises(ValueError, match="weight: expected at most 64 classes"):
        Case((1, 2, 3, 65)).run()
