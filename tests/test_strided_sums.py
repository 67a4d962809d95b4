"""Many tensors copied, summed and scaled in one call: the closed form, and the Triton kernel by its interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mamlpp_fast.testing import backends, use_backend

strided_sums = torch.ops.mamlpp_fast.strided_sums.default


def _cases(source: torch.dtype, target: torch.dtype) -> list[tuple[Tensor, Tensor, float, Tensor]]:
    """Outs poisoned, terms, scales, and what is expected, by einsum and loops that share nothing with the code."""
    g, tasks = torch.Generator().manual_seed(0), 3

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(source)

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=target)

    weight = rand(5, 3, 2, 4)  # [Co, Ci, kh, kw] into the kernels' layout, and back
    kernel = rand(2, 4, 3, 5)
    table = rand(2, 4, 2, tasks, 7)  # [G, K, 2, T, C]
    each = rand(tasks, 33, 9)
    big = rand(300, 3)
    number = torch.tensor(-0.0, dtype=source)
    rows, back = nan(3, 7), nan(5, 3, 2, 4)
    return [
        (nan(2, 4, 3, 5), weight.permute(2, 3, 1, 0), 1.0, torch.einsum("abcd->cdba", weight)),
        (back.permute(2, 3, 1, 0), kernel, 1.0, kernel),
        (nan(tasks, 2, 4, 3, 5), kernel.expand(tasks, 2, 4, 3, 5), 1.0, torch.stack([kernel] * tasks)),
        (nan(33, 9), each, 1 / tasks, sum(e.double() for e in each) / tasks),
        (
            rows[:2],
            table[:, :2].permute(0, 2, 3, 1, 4),
            1 / tasks,
            torch.einsum("gkstc->kc", table[:, :2].double()) / tasks,
        ),
        (
            rows[2],
            table[:, 2:].flatten(2, 3),
            1 / tasks,
            torch.einsum("gkstc->c", table[:, 2:].double()) / tasks,
        ),
        (nan(300, 3), big, -2.5, big.double() * -2.5),
        (nan(6), number.expand(6), 1.0, torch.zeros(6)),
        (nan(), rand(4), 0.5, None),
        (nan(0, 3), rand(0, 3), 1.0, torch.empty(0, 3)),
    ]  # type: ignore[list-item]


@pytest.mark.parametrize("backend", backends("strided_sums"))
@pytest.mark.parametrize("target", [torch.float64, torch.float32], ids=["to64", "to32"])
@pytest.mark.parametrize("source", [torch.float64, torch.float32], ids=["from64", "from32"])
def test_every_tensor_is_its_sum(backend: str, source: torch.dtype, target: torch.dtype) -> None:
    cases = _cases(source, target)
    outs, terms, scales = ([case[i] for case in cases] for i in range(3))
    with use_backend(backend):
        strided_sums(outs, terms, scales)
    tolerance = 1e-14 if target == torch.float64 else 1e-7
    for out, term, scale, expected in cases:
        if expected is None:
            expected = term.double().sum() * scale
        assert_close(out.double(), expected.double().view(out.shape), rtol=tolerance, atol=tolerance)
    if source == target:  # what is copied keeps its bits, a zero its sign
        assert torch.equal(outs[0], terms[0])
        assert torch.signbit(outs[7]).all()


@pytest.mark.parametrize("backend", backends("strided_sums"))
def test_more_tensors_than_a_table_has_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those without a kernel: whole numbers, too many axes."""
    if backend == "triton":
        from mamlpp_fast.kernels import strided_sums as kernels

        monkeypatch.setattr(kernels, "_ROWS", (2, 4))
    terms = [torch.full((2,), float(i)) for i in range(10)]
    outs = [torch.full((2,), torch.nan) for _ in terms]
    many = torch.rand(2, 3, 2, 3, 2, 3, 2).permute(6, 4, 2, 0, 1, 3, 5)
    numbers, wide = torch.zeros(3, dtype=torch.int64), torch.full(many.shape, torch.nan)
    with use_backend(backend):
        strided_sums([*outs, numbers, wide], [*terms, torch.arange(3), many], [1.0] * 12)
    assert [out.tolist() for out in outs] == [[i, i] for i in range(10)]
    assert numbers.tolist() == [0, 1, 2]
    assert torch.equal(wide, many)


def test_what_it_writes_counts_as_changed() -> None:
    outs = [torch.zeros(2), torch.zeros(3)]
    strided_sums(outs, [torch.ones(2), torch.ones(3)], [1.0, 1.0])
    assert all(out._version for out in outs)


@pytest.mark.parametrize("backend", backends("strided_sums"))
def test_mistakes_are_named(backend: str) -> None:
    with use_backend(backend):
        with pytest.raises(ValueError, match="expected as many terms"):
            strided_sums([torch.zeros(2)], [], [1.0])
        with pytest.raises(ValueError, match=r"expected \[..., \(2,\)\], got \(3,\)"):
            strided_sums([torch.zeros(2)], [torch.zeros(3)], [1.0])
