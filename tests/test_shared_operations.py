"""Operations in several roles on the same weights: each role's results are those of the operation itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_helpers import backend_fixture, opcheck
from torch import Tensor

from mamlpp_fast.ops._library import OPERATIONS
from mamlpp_fast.testing import backends, use_backend

SHARED = ("task_conv2d", "conv_norm_act_pool", "linear_cross_entropy")
TASKS, IMAGES = 2, 3
backend = backend_fixture("task_conv2d", but="native")


class Roles:
    """Operands of ``roles`` roles, the weights' alone shared, and results full of NaN, gradients of weights apart."""

    def __init__(self, roles: int, dtype: torch.dtype) -> None:
        self.roles, self.dtype = roles, dtype
        torch.manual_seed(0)

    def all(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(self.roles * TASKS, *shape, dtype=dtype or self.dtype)

    def one(self, *shape: int) -> Tensor:
        return torch.randn(TASKS, *shape, dtype=self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full((self.roles * TASKS, *shape), torch.nan, dtype=dtype or self.dtype)

    def apart(self, *shape: int) -> Tensor:
        """[R, T, *shape], 16 elements more from role to role than there need be."""
        size = TASKS * torch.Size(shape).numel()
        self.memory = torch.full((self.roles, size + 16), torch.nan, dtype=self.dtype)
        return self.memory[:, :size].unflatten(1, (TASKS, *shape))


def assert_each_role(roles: Roles, name: str, given: dict[str, Any], results: dict[str, Tensor]) -> None:
    """``name_shared`` leaves what one call of ``name`` a role does."""
    shared, plain = (OPERATIONS[n] for n in (f"{name}_shared", name))
    shared.overload(*given.values(), *results.values())
    arguments = [a.name for a in plain.overload._schema.arguments]
    assert [*given, *results] == arguments[: len(given) + len(results)]
    for role in range(roles.roles):

        def own(n: str, value: Any, role: int = role) -> Any:
            if not isinstance(value, Tensor) or n in ("w", "weight", "bias"):
                return value
            if len(value) == roles.roles * TASKS:
                return value[role * TASKS : (role + 1) * TASKS]
            return value[role]

        expected = {
            n: torch.full_like(own(n, t), 7 if t.dtype == torch.uint8 else torch.nan)
            for n, t in results.items()
        }
        # Copies, as a role's part need not start where a tensor does.
        operands = [v.clone() if isinstance(v, Tensor) else v for v in (own(n, v) for n, v in given.items())]
        plain.overload(*operands, *expected.values())
        for n, value in expected.items():
            rounding = 1e-5 if roles.dtype == torch.float32 else 1e-11
            torch.testing.assert_close(
                own(n, results[n]), value, rtol=rounding, atol=rounding, msg=f"{n} of {role}"
            )


@pytest.mark.parametrize(
    ("ci", "co", "dtype"),
    [(1, 5, torch.float64), (16, 32, torch.float64), (16, 32, torch.float32)],
    ids=["flat", "dense", "three products"],
)
def test_convolutions(backend: str, ci: int, co: int, dtype: torch.dtype) -> None:
    roles = Roles(2, dtype)
    x, w, g = roles.all(IMAGES, 5, 4, ci), roles.one(3, 3, ci, co), roles.all(IMAGES, 5, 4, co)
    pair = {"x2": None, "w2": None, "stride": 1, "padding": 1}
    assert_each_role(roles, "task_conv2d", {"x": x, "w": w, **pair}, {"out": roles.empty(*g.shape[1:])})
    given = {"x": x, "w": w, "g": g, "x2": None, "w2": None, "g2": None, "stride": 1, "padding": 1}
    results = {"gx": roles.empty(*x.shape[1:]), "gw": roles.apart(3, 3, ci, co)}
    assert_each_role(roles, "task_conv2d_gradients", given, results)
    assert bool(roles.memory[:, -16:].isnan().all())


@pytest.mark.parametrize("rows", [True, False], ids=["a row each", "one row"])
def test_first_layers(backend: str, rows: bool) -> None:
    roles, channels = Roles(2, torch.float64), 5
    images, w = roles.all(IMAGES, 6, 7, 1), roles.one(3, 3, 1, channels)
    padded, moments = roles.empty(IMAGES, 8, 9, 1), roles.empty(11, 9)
    torch.ops.mamlpp_fast.patch_moments(images, 3, 3, 1, padded, moments)
    each = torch.randn(2, 2, channels, dtype=torch.float64)
    gamma, beta = each if rows else each[0]
    y, stats = (IMAGES, 3, 3, channels), [roles.empty(channels) for _ in range(4)]
    index = torch.full((2 * TASKS, *y), 7, dtype=torch.uint8)
    results = {"y": roles.empty(*y), "index": index, "mean": stats[0], "rstd": stats[1]}
    given: dict[str, Any] = {"padded": padded, "moments": moments, "w": w, "gamma": gamma, "beta": beta}
    affine = given if rows else given | {"gamma": gamma.expand(2, -1), "beta": beta.expand(2, -1)}
    torch.ops.mamlpp_fast.conv_norm_act_pool_shared(*given.values(), 1e-5, 0.1, *results.values())
    assert_each_role(roles, "conv_norm_act_pool", affine | {"eps": 1e-5, "slope": 0.1}, results)
    saved = {"y": results["y"], "index": index, "padded": padded, "moments": moments, "w": w}
    given = {"gy": roles.all(*y), **saved, "gamma": affine["gamma"], "rstd": stats[1], "slope": 0.1}
    results = {"gw": roles.apart(3, 3, 1, channels), "sums": roles.empty(9, channels)}
    results |= {"ggamma": stats[2], "gbeta": stats[3]}
    assert_each_role(roles, "conv_norm_act_pool_backward", given, results)
    assert bool(roles.memory[:, -16:].isnan().all())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_heads(backend: str, bias: bool) -> None:
    roles, features, classes = Roles(3, torch.float64), 9, 5
    f, weight = roles.all(IMAGES, features), roles.one(features, classes)
    z = (IMAGES, classes)
    given = {"f": f, "weight": weight, "bias": roles.one(classes) if bias else None}
    given |= {"target": roles.all(*z).softmax(-1), "scale": torch.rand(3, dtype=torch.float64)}
    results = {name: roles.empty(*z) for name in ("logits", "probabilities", "gz")} | {"loss": roles.empty()}
    assert_each_role(roles, "linear_cross_entropy", given, results)
    grads = {"gf": roles.empty(IMAGES, features), "gweight": roles.apart(features, classes)}
    grads["gbias"] = roles.apart(classes)
    assert_each_role(
        roles, "linear_cross_entropy_backward", {"gz": roles.all(*z), "f": f, "weight": weight}, grads
    )


def test_what_does_not_belong_together_is_refused(backend: str) -> None:
    roles = Roles(2, torch.float64)
    x, w, out = roles.all(IMAGES, 5, 5, 2), roles.one(3, 3, 2, 4), roles.empty(IMAGES, 5, 5, 4)
    op = torch.ops.mamlpp_fast.task_conv2d_shared
    with pytest.raises(ValueError, match="expected 2 tasks for each role, got 3 in all"):
        op(x[:3], w, None, None, 1, 1, out[:3])
    with pytest.raises(ValueError, match="expected output"):
        op(x, w, None, None, 1, 1, out[..., :3])


def test_gradients_that_start_in_between_are_refused() -> None:
    if "triton" not in backends("task_conv2d"):
        pytest.skip("no Triton interpreter")
    roles = Roles(2, torch.float64)
    x, w, g = roles.all(IMAGES, 5, 4, 1), roles.one(3, 3, 1, 5), roles.all(IMAGES, 5, 4, 5)
    gw = torch.empty(2, TASKS * 45 + 1, dtype=torch.float64)[:, :-1].unflatten(1, (TASKS, 3, 3, 1, 5))
    with use_backend("triton"), pytest.raises(ValueError, match="to start on 16 bytes"):
        torch.ops.mamlpp_fast.task_conv2d_gradients_shared(x, w, g, None, None, None, 1, 1, x, gw)


def test_torch_finds_the_operations_sound() -> None:
    roles = Roles(2, torch.float64)
    x, w, out = roles.all(IMAGES, 5, 5, 2), roles.one(3, 3, 2, 4), roles.empty(IMAGES, 5, 5, 4)
    opcheck({"task_conv2d_shared": (x, w, None, None, 1, 1, out)})
    assert {n for n in OPERATIONS if n.endswith("_shared")} == {
        *(f"{n}_shared" for n in SHARED),
        "task_conv2d_gradients_shared",
        *(f"{n}_backward_shared" for n in SHARED[1:]),
    }
