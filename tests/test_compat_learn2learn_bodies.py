"""What learn2learn's learners do without a clone's help: the body of ANIL, and the order of modules and parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from test_compat_learn2learn import RATE, STEPS, WAYS, _Tied, network
from torch import Tensor, nn

import mamlpp_fast as mf
import mamlpp_fast.compat.learn2learn as l2l
from mamlpp_fast.compat.learn2learn.algorithms import MAML
from mamlpp_fast.compat.learn2learn.utils import modules_of, parameters_of


class _Own(nn.Module):
    """Says itself which parameters there are."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.one.parameters(recurse)


def test_modules_and_parameters_are_found_in_pytorchs_order() -> None:
    tied, stages = _Tied(), l2l.vision.models.OmniglotCNN(WAYS, 4)  # which holds its stages twice
    for module in (tied, stages, network(), nn.Sequential(nn.Identity(), tied, tied), _Own()):
        assert list(map(id, modules_of(module))) == list(map(id, module.modules()))
        assert list(map(id, parameters_of(module))) == list(map(id, module.parameters()))


def test_anils_body_is_served_where_no_clone_holds_it() -> None:
    """Features, meta-gradients and running statistics as those of the same modules by PyTorch's own operations."""
    torch.manual_seed(0)
    for body in (
        l2l.vision.models.CNN4(WAYS, 4, channels=1, max_pool=True, embedding_size=4).double().features,
        nn.Sequential(l2l.vision.models.ConvBase(4, 1, max_pool=False).double(), nn.Flatten()),
    ):
        head = nn.Linear(16 if isinstance(body[-1], nn.Flatten) else 4, WAYS).double()
        x, y = torch.randn(2 * WAYS, 1, 28, 28, dtype=torch.float64), torch.arange(WAYS).repeat(2)

        def step(body: nn.Module, head: nn.Linear, x: Tensor = x, y: Tensor = y) -> list[Tensor]:
            learner = MAML(head, lr=RATE).clone()
            features = body(x)
            for _ in range(STEPS):
                learner.adapt(F.cross_entropy(learner(features[:WAYS]), y[:WAYS]))
            loss = F.cross_entropy(learner(features[WAYS:]), y[WAYS:])
            grads = torch.autograd.grad(loss, [*body.parameters(), *head.parameters()])
            return [features.detach(), *grads, *(b.double() for b in body.buffers())]

        other = copy.deepcopy(body)
        found = step(body, head)
        with l2l.plain_batch_norm():
            expected = step(other, head)
        served = body if isinstance(body, l2l.vision.models.ConvBase) else body[0]
        assert "one operation" in mf.acceleration(served)
        floor = 1e-4 * max(float(t.abs().max()) for t in expected)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * floor + 1e-12)
