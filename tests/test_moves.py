"""What goes between the tensors of a call and a program's memory, by the native library and by PyTorch's operators."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mamlpp_fast.engine.fused.held import Held, Taken
from mamlpp_fast.engine.fused.moves import Follower, Moves
from mamlpp_fast.engine.fused.network import Norm, Statistics
from mamlpp_fast.engine.fused.steps import Slot


def slot(name: str, split: tuple[int, ...], order: tuple[int, ...]) -> Slot:
    return Slot(name, tuple(split[i] for i in order), split, order)


# Whole blocks of registers and none, the kernels' window, a matrix, a head behind images, vectors, another order.
SHAPES = {
    "conv": ((64, 16, 3, 3), (64, 16, 3, 3), (2, 3, 1, 0)),
    "odd conv": ((5, 3, 2, 3), (5, 3, 2, 3), (2, 3, 1, 0)),
    "between": ((37, 19, 3, 3), (37, 19, 3, 3), (2, 3, 1, 0)),
    "one input": ((64, 1, 3, 3), (64, 1, 3, 3), (2, 3, 1, 0)),
    "linear": ((7, 33), (7, 33), (1, 0)),
    "head": ((5, 24), (5, 6, 2, 2), (2, 3, 1, 0)),
    "vector": ((13,), (13,), (0,)),
    "other": ((4, 3, 5), (4, 3, 5), (1, 2, 0)),
    "number": ((), (), ()),
}


def moves_of(names: list[str], dtype: torch.dtype = torch.float64) -> Moves:
    places = [torch.empty([SHAPES[n][1][i] for i in SHAPES[n][2]], dtype=dtype) for n in names]
    return Moves([slot(n, *SHAPES[n][1:]) for n in names], places)


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: object, types: object, args: object = (), kwargs: object = None
    ) -> object:
        return func(*args, **(kwargs or {}))  # type: ignore[operator,misc]


@pytest.fixture(params=["native", "watched"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The library, and PyTorch's operators, which what watches the caller can see; without autograd, as in a pass."""
    with torch.no_grad():
        if request.param == "native":
            yield request.param
            return
        with _Watching():  # type: ignore[no-untyped-call]
            yield request.param


def drawn(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {n: torch.randn(shape, dtype=dtype) for n, (shape, *_) in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poisoned_memory")
def test_what_goes_in_lies_as_the_kernels_have_it_and_comes_out_again(path: str, dtype: torch.dtype) -> None:
    names, own = list(SHAPES), drawn(dtype)
    moves = moves_of(names, dtype)
    moves.load([own[n].requires_grad_() for n in names])
    for n, place in zip(names, moves.places, strict=True):
        expected = own[n].detach().reshape(SHAPES[n][1]).permute(SHAPES[n][2])
        torch.testing.assert_close(place, expected, rtol=0, atol=0)
    inert = torch.randn(3, dtype=dtype)
    *taken, zeros = moves.take([*own.values(), inert])
    for found, t in zip(taken, own.values(), strict=True):
        assert not found.requires_grad and found.is_contiguous()
        torch.testing.assert_close(found, t.detach(), rtol=0, atol=0)
    torch.testing.assert_close(zeros, torch.zeros_like(inert), rtol=0, atol=0)
    taken[0].add_(1)  # nobody else's memory
    torch.testing.assert_close(moves.take(list(own.values()))[0], own["conv"].detach(), rtol=0, atol=0)


@pytest.mark.usefixtures("poisoned_memory")
def test_what_does_not_lie_plainly_is_copied_all_the_same(path: str) -> None:
    """Channels-last weights, parts of others, an expanded number, another type, negated views, nothing."""
    own = drawn(torch.float64)
    given: dict[str, Tensor | None] = {
        "conv": own["conv"].to(memory_format=torch.channels_last),
        "odd conv": torch.randn(5, 4, 2, 3, dtype=torch.float64)[:, 1:],
        "one input": own["one input"].float(),
        "linear": own["linear"].t().contiguous().t(),
        "vector": torch.tensor(2.0, dtype=torch.float64).expand(13),
        "head": torch.imag(torch.complex(own["head"], own["head"]).conj()),
        "other": None,
        "between": None,
    }
    names = list(given)
    moves = moves_of(names)
    moves.load(list(given.values()))
    for n, place in zip(names, moves.places, strict=True):
        t = given[n]
        whole = torch.zeros(SHAPES[n][0], dtype=torch.float64) if t is None else t.double().resolve_neg()
        torch.testing.assert_close(place, whole.reshape(SHAPES[n][1]).permute(SHAPES[n][2]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poisoned_memory")
def test_times_a_number_and_onto_other_tensors(path: str, dtype: torch.dtype) -> None:
    """What is added may lie in any way, or be nothing."""
    names, own = list(SHAPES), drawn(dtype)
    moves = moves_of(names, dtype)
    moves.load([None if n == "other" else own[n] for n in names], -0.5)
    torch.manual_seed(1)
    plus: dict[str, Tensor | None] = {n: torch.randn_like(t) for n, t in own.items()}
    plus["linear"] = torch.randn(33, 7, dtype=dtype).t()
    plus["vector"] = torch.tensor(2.0, dtype=dtype).expand(13)
    plus["odd conv"] = None
    inert, beside = torch.randn(2, 3, dtype=dtype)
    found = moves.take([*own.values(), inert, inert], [*plus.values(), beside, None], 3.0)
    for n, t in zip(names, found, strict=False):
        term, place = plus[n], torch.zeros_like(own[n]) if n == "other" else own[n]
        expected = -1.5 * place + (0 if term is None else term)
        assert t.is_contiguous() and all(t is not p for p in plus.values())
        torch.testing.assert_close(t, expected)
    torch.testing.assert_close(found[-2:], [beside, torch.zeros_like(inert)], rtol=0, atol=0)
    found[-2].add_(1)  # nobody else's memory
    assert not torch.equal(found[-2], beside)


def test_what_nobody_wants_is_not_given(path: str) -> None:
    names, own = list(SHAPES), drawn(torch.float64)
    moves = moves_of(names)
    moves.load(list(own.values()))
    to = {n: None if n in ("conv", "other") else torch.zeros_like(t) for n, t in own.items()}
    moves.give(list(to.values()))
    for n, t in to.items():
        assert t is None or torch.equal(t, own[n])
    moves.give([None for _ in names])


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="orders: expected 1, got 0"):
        torch.classes.mamlpp_fast.Moves([[2]], [], [torch.zeros(2)])
    with pytest.raises(ValueError, match="orders: expected 1 axes, got 2"):
        torch.classes.mamlpp_fast.Moves([[2]], [[0, 1]], [torch.zeros(2)])
    with pytest.raises(ValueError, match="places: expected 1, got 2"):
        torch.classes.mamlpp_fast.Moves([[2]], [[0]], [torch.zeros(2)] * 2)
    native = torch.classes.mamlpp_fast.Moves([[2]], [[0]], [torch.zeros(2)])
    for move in (native.load, native.take, native.give):
        with pytest.raises(ValueError, match="tensors: expected 1 or more, got 0"):
            move([])
    with pytest.raises(ValueError, match="plus: expected none or 1, got 2"):
        native.take([torch.zeros(2)], [None, None], 1.0)
    lane, places = torch.classes.mamlpp_fast.Lane, [torch.zeros(2)] * 5
    calls = torch.classes.mamlpp_fast.Calls()
    with pytest.raises(ValueError, match="expected four moves and four sections, got 1 and 4"):
        lane([native], [calls] * 4, places)
    with pytest.raises(ValueError, match="places: expected 5 or more, got 4"):
        lane([native] * 4, [calls] * 4, places[1:])
    team = torch.classes.mamlpp_fast.Team([lane([native] * 4, [calls] * 4, places)])
    with pytest.raises(IndexError, match="lane: expected one of 1, got 1"):
        team.add(1)
    with pytest.raises(ValueError, match="inputs: expected none or 1, got 2"):
        team.add(0, places[:2])
    with pytest.raises(ValueError, match="one number a norm"):
        torch.classes.mamlpp_fast.Statistics([1e-5], [0.1], [])
    with pytest.raises(ValueError, match="expected 1 tensors of each kind"):
        torch.classes.mamlpp_fast.Statistics([1e-5], [0.1], [1.0]).follow([], [], [], [], [], [])


class _Norms(nn.Module):
    """Two batch norms behind convolutions: what a follower is to do for them, it does itself by ``F.batch_norm``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1, dtype=dtype)
        self.first = nn.BatchNorm2d(5, momentum=0.3, dtype=dtype)
        self.second = nn.BatchNorm2d(5, eps=1e-2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.conv(x)))


def _follower(model: _Norms, images: int, elements: int) -> Follower:
    norms = {}
    for name, bias in (("first", "conv.bias"), ("second", None)):
        norm: nn.BatchNorm2d = getattr(model, name)
        buffers = f"{name}.running_mean", f"{name}.running_var", f"{name}.num_batches_tracked"
        assert norm.momentum is not None
        norms[name] = Norm(elements, Statistics(*buffers, 1, norm.momentum, norm.eps), bias)
    return Follower(norms, images, torch.device("cpu"))


def _statistics(model: _Norms, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Means and reciprocal deviations of the batch, of the first norm without the bias in front."""
    y = F.conv2d(x, model.conv.weight.detach())
    found = {}
    for name in ("first", "second"):
        norm: nn.BatchNorm2d = getattr(model, name)
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        found[name] = mean, (var + norm.eps).rsqrt()
        y = F.batch_norm(y, None, None, norm.weight.detach(), norm.bias.detach(), True, 0.0, norm.eps)
    return found


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("lies", ["plainly", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_follow_as_batch_norms(
    path: str, dtype: torch.dtype, lies: str, later: bool
) -> None:
    torch.manual_seed(0)
    model = _Norms(dtype)
    x = torch.randn(4, 3, 2, 3, dtype=dtype)
    plain = copy.deepcopy(model)
    if lies == "strided":
        for norm in (model.first, model.second):
            for name, b in list(norm.named_buffers()):
                if b.ndim:
                    setattr(norm, name, torch.stack([b, b], 1)[:, 0])
    follower = _follower(model, 4, 6)
    todo: list[Taken] | None = [] if later else None
    for batch in (x, 2 * x + 1):
        plain(batch)
        follower(Held(model, later=todo), _statistics(model, batch))
    for taken in todo or []:
        taken.apply()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=name)


def test_statistics_of_another_form_are_left_alone() -> None:
    """The native library says so, and has done nothing, to the norm in front of that one neither."""
    native = torch.classes.mamlpp_fast.Statistics([1e-5] * 2, [0.1] * 2, [1.0] * 2)
    good, other = torch.ones(3), torch.ones(3, dtype=torch.float64)
    kept, counts = [torch.ones(3), torch.ones(3)], [torch.tensor(4), torch.tensor([7])]
    assert not native.follow([kept[0], other], kept, [good] * 2, [good] * 2, [None] * 2, counts)
    assert not native.follow(kept, kept, [good] * 2, [good] * 2, [None, torch.ones(4)], counts)
    for wrong in (torch.tensor(4.0), torch.tensor([1, 2]), torch.tensor(4, dtype=torch.int32)):
        assert not native.follow(kept, kept, [good] * 2, [good] * 2, [None, good], [counts[0], wrong])
    with torch.inference_mode():
        unversioned = torch.tensor(4)
    assert not native.follow(kept, kept, [good] * 2, [good] * 2, [None, good], [counts[0], unversioned])
    assert all(torch.equal(t, torch.ones(3)) for t in kept)
    assert [int(t) for t in (*counts, unversioned)] == [4, 7, 4] and counts[0]._version == 0
    assert native.follow(kept, [torch.ones(3)] * 2, [good] * 2, [good] * 2, [None, good], counts)
    assert math.isclose(kept[1][0].item(), 0.9 + 0.1 * 2, rel_tol=1e-6)
    assert [int(t) for t in counts] == [5, 8] and counts[0]._version == counts[1]._version == 1
