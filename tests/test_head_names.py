"""Which parameters are a model's head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mamlpp_fast.engine.record import head_names


class _Body(nn.Module):
    def __init__(self, head: nn.Module, *, first: bool = False) -> None:
        super().__init__()
        if first:
            self.head = head
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        if not first:
            self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class _Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.centres = nn.Parameter(torch.randn(2, 4))
        self.temperature = nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        similar = F.normalize(self.body(x), dim=-1) @ F.normalize(self.centres, dim=-1).T
        return self.temperature * similar


class _Unused(_Body):
    """Registers, and calls, a layer that reaches no output."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 2))
        self.probe = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.probe(self.body(x))
        return out


def _frozen_head() -> nn.Module:
    net = _Body(nn.Linear(4, 2))
    net.head.requires_grad_(False)
    return net


HEADS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], set[str]]] = {
    "last": (lambda: _Body(nn.Linear(4, 2)), {}, {"head.weight", "head.bias"}),
    "registered-first": (lambda: _Body(nn.Linear(4, 2), first=True), {}, {"head.weight", "head.bias"}),
    "of-several-layers": (
        lambda: _Body(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))),
        {},
        {"head.2.weight", "head.2.bias"},
    ),
    "reparametrised": (
        lambda: _Body(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))),
        {},
        {"head.bias", "head.parametrizations.weight.original0", "head.parametrizations.weight.original1"},
    ),
    "of-the-model-itself": (_Cosine, {}, {"centres", "temperature"}),
    "unused-layer": (_Unused, {}, {"head.weight", "head.bias"}),
    "frozen": (_frozen_head, {}, {"body.0.weight", "body.0.bias"}),
    "norm-last": (
        lambda: _Body(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))),
        {},
        {"head.0.weight", "head.0.bias"},
    ),
    "adapting-norm-last": (
        lambda: _Body(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))),
        {"adapt_norm": True},
        {"head.1.weight", "head.1.bias"},
    ),
    "beyond-the-fused-engine": (
        lambda: _Body(nn.Sequential(nn.GELU(), nn.Dropout(0.5), nn.Linear(4, 2), nn.Softmax(-1))),
        {},
        {"head.2.weight", "head.2.bias"},
    ),
}


@pytest.mark.parametrize(("make", "options", "names"), HEADS.values(), ids=HEADS.keys())
def test_the_head_is_what_reaches_the_output_last(
    make: Callable[[], nn.Module], options: dict[str, Any], names: set[str]
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    assert set(head_names(model, torch.randn(5, 3), **options)) == names
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_head_needs_parameters() -> None:
    with pytest.raises(
        ValueError, match="adapt: expected a last module with parameters that reach the output"
    ):
        head_names(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.randn(5, 3))
