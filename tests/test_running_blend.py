"""Running statistics after many passes: pass after pass in a loop, the closed form, the Triton kernel's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from mamlpp_fast.engine.running import RunningStats, made_passes
from mamlpp_fast.testing import backends, use_backend

running_blend = torch.ops.mamlpp_fast.running_blend.default


@pytest.mark.parametrize("backend", backends("running_blend"))
@pytest.mark.parametrize(
    ("own", "stats"),
    [(torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float32, torch.float32)],
    ids=["64", "32of64", "32"],
)
@pytest.mark.parametrize(("groups", "bias", "rows"), [(1, True, 4), (3, False, 2), (2, True, 1)])
def test_the_blend_is_pass_after_pass(
    backend: str, own: torch.dtype, stats: torch.dtype, groups: int, bias: bool, rows: int
) -> None:
    """Passes that were not made have a share of zero and a rstd of 1."""
    g = torch.Generator().manual_seed(0)
    steps, tasks, channels, momentum, eps = 4, 2, 37, 0.1, 1e-5
    made = made_passes(steps, False)
    size = 2 * steps * 2 * tasks * channels
    # As in the engine: the results of a group are a row of a table that holds more.
    table = torch.rand(groups, size + 24, generator=g, dtype=torch.float64).to(stats)
    means, rstds = (
        part.unflatten(-1, (steps, 2, tasks, channels)).movedim(0, 2)
        for part in (table[:, : size // 2], table[:, size // 2 + 24 :])
    )
    means.copy_(means * 4 - 2)
    rstds.copy_(rstds + 0.5)
    rstds[:-1, 1] = 1.0
    counts = (11, 7)
    like = torch.zeros((), dtype=torch.float64)
    running = RunningStats.of(
        ("m", "v", None, None), rows=rows, channels=channels, momentum=momentum, eps=eps, made=made,
        tasks=groups * tasks, counts=counts, like=like,
    )  # fmt: skip
    mean, var = (torch.rand(rows, channels, generator=g, dtype=torch.float64).to(own) for _ in range(2))
    shift = torch.rand(channels, generator=g, dtype=torch.float64).to(own) if bias else None
    expected_mean, expected_var = mean.double(), var.double()
    for group in range(groups):
        for task in range(tasks):
            for step in range(steps):
                for side in (0, 1):
                    if not made[step, side]:
                        continue
                    row = min(step, rows - 1)
                    seen = means[step, side, group, task].double() + (0 if shift is None else shift.double())
                    biased = rstds[step, side, group, task].double() ** -2 - eps
                    unbiased = biased * counts[side] / (counts[side] - 1)
                    expected_mean[row] += momentum * (seen - expected_mean[row])
                    expected_var[row] += momentum * (unbiased - expected_var[row])
    with use_backend(backend):
        running_blend(
            mean, var, means, rstds, running.decay, running.share, running.unbiased_share, shift, eps
        )
    tolerance = 1e-12 if own == torch.float64 else 1e-6
    assert_close(mean.double(), expected_mean, rtol=tolerance, atol=tolerance)
    assert_close(var.double(), expected_var, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif("triton" not in backends("running_blend"), reason="no interpreter of Triton")
def test_what_the_kernel_cannot_take_is_named() -> None:
    from mamlpp_fast.kernels import running_blend as kernels

    stats, row, share = torch.zeros(2, 2, 1, 3, 5), torch.zeros(1, 5), torch.zeros(1, 12).double()
    decay = torch.ones(1, 1).double()
    with pytest.raises(ValueError, match="means: expected strides"):
        kernels.blend(row, row, stats.transpose(0, 1), stats, decay, share, share, None, 0.0)
    with pytest.raises(TypeError, match="expected float32 or float64"):
        kernels.blend(row, row, stats, stats, decay.float(), share, share, None, 0.0)
    with use_backend("triton"), pytest.raises(ValueError, match="expected statistics"):
        running_blend(row, row, stats, stats, decay, share[:, :3], share, None, 0.0)
