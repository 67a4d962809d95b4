"""Ways of writing that public networks share, on both engines that compute by programs, against a textbook loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import CLOSE
from test_generic_steps import IMAGES, SEQUENCE, SETTINGS, TOKENS, WAYS, Calls, batch_of, compare
from textbook import Textbook
from torch import Tensor, nn

import mamlpp_fast as mf

pytestmark = pytest.mark.usefixtures("nothing_accelerated")


def _heads(m: Any, x: Tensor) -> Tensor:
    """Attention as it is written by hand: heads are merged by a view of a copy."""
    n, length, _ = x.shape
    q, k, v = (f(x).view(n, length, 2, 3).transpose(1, 2) for f in (m.q, m.k, m.v))
    mixed = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
    return m.head(mixed.transpose(1, 2).contiguous().view(n, -1, 6).mean(1))


def _shuffled(m: Any, x: Tensor) -> Tensor:
    """Channels of two groups in turn."""
    h = F.relu(m.norm(m.conv(x)))
    n, c, a, b = h.shape
    h = h.view(n, 2, c // 2, a, b).transpose(1, 2).contiguous().view(n, -1, a, b)
    pooled = F.max_pool2d(h, 3)
    return m.head(pooled.transpose(1, 2).contiguous().view_as(pooled).flatten(1))


def _windows(m: Any, x: Tensor) -> Tensor:
    """Attention within windows, which are examples of their own on the way."""
    n, c, a, b = x.shape
    h = x.view(n, c, 2, a // 2, 2, b // 2).permute(0, 2, 4, 3, 5, 1).contiguous().view(-1, a * b // 4, c)
    h = torch.softmax(m.q(h) @ m.k(h).mT, -1) @ h
    return m.head(h.view(n, 2, 2, a // 2, b // 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, -1))


def _cells(m: Any, x: Tensor) -> Tensor:
    h = memory = x.new_zeros(len(x), 4)
    plain = torch.zeros_like(h)
    for t in range(x.shape[1]):
        h, memory = m.lstm(m.gru(x[:, t], h), (h, memory))
        plain = m.relu(m.tanh(h, plain), plain)
    return m.head(h + plain)


def _genres(m: Any, x: Tensor) -> Tensor:
    """Counts in float32 whatever the model is in, offsets of tables out of plain numbers."""
    share = x.float() / torch.sum(x.float(), 1, keepdim=True).clamp(min=1)
    offsets = x.new_tensor([0, 0, 1, 0, 2, 0, 0]).unsqueeze(0)
    codes = m.table((x + offsets) % 9).sum(1)
    return m.head(torch.tanh(codes + share @ m.table.weight[:7].detach().float()))


def _scaled_scores(m: Any, x: Tensor) -> Tensor:
    """A mask of infinities that is scaled with the scores."""
    mask = torch.triu(torch.ones(len(x), x.shape[1], x.shape[1], dtype=torch.bool), 1)
    scores = torch.einsum("nle,nse->nls", m.q(x), m.k(x))
    scores.masked_fill_(mask, -math.inf)
    return m.head((torch.softmax(1.0 / math.sqrt(3) * scores, -1) @ x).mean(1))


def _turned(m: Any, x: Tensor) -> Tensor:
    """A spatial transformer."""
    theta = m.where(x.flatten(1)).view(-1, 2, 3) * 0.3 + torch.eye(2, 3, dtype=x.dtype)
    return m.head(F.grid_sample(x, F.affine_grid(theta, x.size(), False), align_corners=False).flatten(1))


def _text(padding: int) -> nn.Module:
    return Calls(
        lambda m, x: m.head(torch.tanh(m.norm(m.conv(m.table(x).mT))).mean(2)),
        table=nn.Embedding(9, 4, padding_idx=padding),
        conv=nn.Conv1d(4, 3, 3),
        norm=nn.GroupNorm(1, 3),
        head=nn.Linear(3, WAYS),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "heads": (
        lambda: Calls(
            _heads, q=nn.Linear(4, 6), k=nn.Linear(4, 6), v=nn.Linear(4, 6), head=nn.Linear(6, WAYS)
        ),
        SEQUENCE,
    ),
    "channels in turn": (
        lambda: Calls(
            _shuffled, conv=nn.Conv2d(2, 4, 3, padding=1), norm=nn.GroupNorm(2, 4), head=nn.Linear(16, WAYS)
        ),
        IMAGES,
    ),
    "windows": (
        lambda: Calls(_windows, q=nn.Linear(2, 3), k=nn.Linear(2, 3), head=nn.Linear(72, WAYS)),
        IMAGES,
    ),
    "cells": (
        lambda: Calls(
            _cells,
            gru=nn.GRUCell(4, 4),
            lstm=nn.LSTMCell(4, 4, bias=False),
            tanh=nn.RNNCell(4, 4),
            relu=nn.RNNCell(4, 4, nonlinearity="relu"),
            head=nn.Linear(4, WAYS),
        ),
        SEQUENCE,
    ),
    "genres": (lambda: Calls(_genres, table=nn.Embedding(9, 4), head=nn.Linear(4, WAYS)), TOKENS),
    "scaled scores": (
        lambda: Calls(_scaled_scores, q=nn.Linear(4, 3), k=nn.Linear(4, 3), head=nn.Linear(4, WAYS)),
        SEQUENCE,
    ),
    "turned": (lambda: Calls(_turned, where=nn.Linear(72, 6), head=nn.Linear(72, WAYS)), IMAGES),
    "around a circle": (
        lambda: nn.Sequential(
            *(nn.Conv1d(5, 4, 3, padding=1, padding_mode="circular"), nn.ELU(), nn.Flatten()),
            nn.Linear(16, WAYS),
        ),
        SEQUENCE,
    ),
    "padded": (lambda: _text(2), TOKENS),
    "padded, counted from the end": (lambda: _text(-7), TOKENS),
    "norm without weights": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False), nn.LeakyReLU(0.1)),
            *(nn.Flatten(), nn.Linear(36, WAYS)),
        ),
        IMAGES,
    ),
}


def _samples_twice() -> bool:
    """Whether PyTorch has a second derivative of ``F.grid_sample``; 2.11 has none."""
    x, grid = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 1, 2, requires_grad=True)
    (g,) = torch.autograd.grad(F.grid_sample(x, grid, align_corners=False).sum(), grid, create_graph=True)
    try:
        torch.autograd.grad(g.sum(), grid, allow_unused=True)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_textbook(name: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamlpp_fast.engine.fused.differentiable.EVEN_WITHOUT_GAIN", True)
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double()
    book = Textbook(copy.deepcopy(model), SETTINGS)
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(**SETTINGS), engine=engine, precision="float64")
    if name == "turned" and not _samples_twice():
        with pytest.raises((RuntimeError, ValueError), match="grid_sampler_2d_backward is not implemented"):
            learner.meta_gradient(mf.EpisodeBatch(*batch_of(shape), by_class=False))
        return
    compare(learner, book, batch_of(shape))
    if engine == "autograd":
        assert "tasks side by side" in learner.explain(), learner.explain()
    for name, buffer in book.model.named_buffers():
        torch.testing.assert_close(learner.model.get_buffer(name), buffer, **CLOSE)
