"""What the launchers launch is what the ahead-of-time compilation compiles: nothing runs here."""

import itertools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

if pytest.importorskip("triton", reason="no Triton").knobs.runtime.interpret is False:
    pytest.skip("TRITON_INTERPRET is not 1", allow_module_level=True)

from mamlpp_fast.kernels import (
    conv_norm_act_pool,
    linear_cross_entropy,
    norm_act_pool,
    per_step_batch_norm,
    running_blend,
    strided_sums,
    task_conv2d,
)
from mamlpp_fast.kernels._launch import TYPE_NAMES, Configuration
from triton.runtime import interpreter

from mamlpp_fast._modes import float32_products

TYPES = {**TYPE_NAMES, torch.uint8: "u8", torch.int64: "i64", torch.int32: "i32"}
FLOATS = (torch.float64, torch.float32, torch.bfloat16)


def _key(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> str:
    stages = options.get("num_stages", 3)
    parts = (sorted(types.items()), sorted((k, str(v)) for k, v in constants.items()))
    return f"{kernel.__name__} {parts} {options['num_warps']} {stages} {options.get('maxnreg')}"


def _listed(module: Any) -> set[str]:
    found: list[Configuration] = list(module.launch_configurations())
    return {_key(c.kernel, c.types, c.constants, c.options()) for c in found}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Filled with a description of every launch, which is not carried out."""
    seen: set[str] = set()

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | {
            k: v for k, v in given.items() if k in self.arg_names
        }
        annotated = self.fn.__annotations__
        constants = {n: v for n, v in named.items() if "constexpr" in str(annotated.get(n))}
        types = {
            n: f"*{TYPES[v.dtype]}"
            if isinstance(v, torch.Tensor)
            else "fp64"
            if isinstance(v, float)
            else "i32"
            for n, v in named.items()
            if n not in constants
        }
        seen.add(_key(self, types, constants, {k: v for k, v in given.items() if k not in self.arg_names}))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)
    return seen


def _batch_norm() -> None:
    for dtype, channels, last in itertools.product(TYPE_NAMES, (64, 100, 1), (False, True)):
        x = torch.ones(2, 3, channels, 4, 5, dtype=dtype)
        if last:
            x = x.movedim(2, -1).contiguous().movedim(-1, 2)
        row = torch.ones(channels, dtype=dtype)
        _, mean, rstd, _ = per_step_batch_norm.forward(x, row, row, None, 1e-5, 0.01)
        per_step_batch_norm.backward(x, x, row, row, mean, rstd, None, 0.01)
        per_step_batch_norm.double_backward(x, row, row, x, x, row, row, mean, rstd, None, 0.01)


def _norm_act_pool() -> None:
    for dtype, channels, pool, whole in itertools.product(FLOATS, (64, 3), *[(False, True)] * 2):
        with mock.patch.object(norm_act_pool, "_WHOLE", 1024 if whole else 0):
            _norm_act_pool_of(dtype, channels, pool)


def _norm_act_pool_of(dtype: torch.dtype, channels: int, pool: bool) -> None:
    z, small = (torch.ones(2, 3, s, s, channels, dtype=dtype) for s in (6, 3 if pool else 6))
    index = torch.ones(small.shape, dtype=torch.uint8)
    mean = torch.ones(2, channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    row, saved = mean[0], (z, index, mean, mean, mean[0], mean[0], 0.01)
    norm_act_pool.forward(z, row, row, 1e-5, 0.01, pool, small, index, mean, mean)
    norm_act_pool.backward(small, *saved, pool, z, mean, mean)
    for moving in ((), (mean, None), (None, row)):
        norm_act_pool.tangent(z, *saved, pool, small, mean, mean, *moving)
    for moved in ((), (mean,)):
        norm_act_pool.backward_tangent(small, small, z, *saved, mean, mean, pool, z, mean, mean, *moved)


def _conv_norm_act_pool() -> None:
    for dtype, ci in itertools.product((torch.float64, torch.float32), (1, 3)):
        x, padded = torch.ones(2, 3, 6, 6, ci, dtype=dtype), torch.ones(2, 3, 8, 8, ci, dtype=dtype)
        moments = torch.ones(2, 9 * ci + 2, 9 * ci, dtype=torch.float64)
        w, sums = torch.ones(2, 3, 3, ci, 64, dtype=dtype), torch.ones(2, 9 * ci, 64, dtype=dtype)
        y, index = torch.ones(2, 3, 3, 3, 64, dtype=dtype), torch.ones(2, 3, 3, 3, 64, dtype=torch.uint8)
        row, rows = torch.ones(64, dtype=dtype), torch.ones(2, 64, dtype=dtype)
        saved = (y, index, padded, moments, w, row, rows, 0.01)
        conv_norm_act_pool.moments(x, 3, 3, 1, padded, moments)
        conv_norm_act_pool.forward(padded, moments, w, row, row, 1e-5, 0.01, y, index, rows, rows)
        conv_norm_act_pool.backward(y, *saved, w, sums, rows, rows)
        for moving in ((), (rows, None), (None, row)):
            conv_norm_act_pool.tangent(w, *saved, y, rows, *moving)
        for moved in ((), (rows,)):
            conv_norm_act_pool.backward_tangent(y, w, *saved, sums, rows, w, rows, rows, *moved)


def _linear_cross_entropy() -> None:
    for dtype, classes in itertools.product((torch.float64, torch.float32), (5, 20)):
        f, weight = torch.ones(2, 3, 40, dtype=dtype), torch.ones(2, 40, classes, dtype=dtype)
        z, bias = torch.ones(2, 3, classes, dtype=dtype), torch.ones(2, classes, dtype=dtype)
        scale = bias[0, 0]
        linear_cross_entropy.forward(f, weight, bias, z, scale, z, z, z, None)
        linear_cross_entropy.backward(z, f, weight, f, weight, bias)
        linear_cross_entropy.tangent(f, weight, None, f, weight, z, scale, z)
        linear_cross_entropy.backward_tangent(z, z, None, weight, f, weight, None, weight, bias)


def _task_conv2d() -> None:
    modes = [*((t, t, "tf32x3") for t in FLOATS), (torch.bfloat16, torch.float32, "tf32x3")]
    modes += [(torch.float32, torch.float32, mode) for mode in ("tf32", "ieee")]
    for (dtype, out, mode), ci in itertools.product(modes, (48, 1)):
        with (
            float32_products(torch.device("cuda"), tf32=mode == "tf32"),
            mock.patch.dict(os.environ, {"MAMLPP_FAST_PRODUCTS": "ieee" if mode == "ieee" else "tf32x3"}),
        ):
            x, g = torch.ones(2, 3, 6, 6, ci, dtype=dtype), torch.ones(2, 3, 6, 6, 64, dtype=dtype)
            w = torch.ones(2, 3, 3, ci, 64, dtype=dtype)
            task_conv2d.forward(x, w, None, None, 1, 1, g.to(out))
            task_conv2d.to_input(g, w, g, w, 1, 1, x.to(out))
            task_conv2d.to_weight(x, g, None, None, 1, 1, w.to(out))
            task_conv2d.gradients(x, w, g, x, w, g, 1, 1, x.to(out), w.to(out))


def _running_blend() -> None:
    for own, stats, bias in itertools.product(FLOATS[:2], FLOATS[:2], (False, True)):
        passes, rows = torch.ones(2, 2, 1, 3, 5, dtype=stats), torch.ones(1, 5, dtype=own)
        share, decay = torch.ones(1, 12, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        shift = rows[0] if bias else None
        running_blend.blend(rows, rows, passes, passes, decay, share, share, shift, 1e-5)


def _strided_sums() -> None:
    for source, target, count in itertools.product(FLOATS[:2], FLOATS[:2], (1, 65)):
        term, out = torch.ones(4, 2, dtype=source), torch.ones(2, dtype=target)
        strided_sums.sums([out] * count, [term] * count, [1.0] * count)


@pytest.mark.parametrize(
    ("module", "calls"),
    [
        pytest.param(per_step_batch_norm, _batch_norm, id="per_step_batch_norm"),
        pytest.param(norm_act_pool, _norm_act_pool, id="norm_act_pool"),
        pytest.param(conv_norm_act_pool, _conv_norm_act_pool, id="conv_norm_act_pool"),
        pytest.param(linear_cross_entropy, _linear_cross_entropy, id="linear_cross_entropy"),
        pytest.param(running_blend, _running_blend, id="running_blend"),
        pytest.param(strided_sums, _strided_sums, id="strided_sums"),
        pytest.param(task_conv2d, _task_conv2d, id="task_conv2d"),
    ],
)
def test_launches_are_the_compiled_configurations(
    module: Any, calls: Callable[[], None], launched: set[str]
) -> None:
    calls()
    assert launched - _listed(module) == set()
    assert _listed(module) - launched == set()
