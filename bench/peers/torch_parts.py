"""What every peer on PyTorch starts from: Conv4 of torch's own modules, and the tasks as tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bench.peers.problem import STAGES, Problem

Named = dict[str, Tensor]
Task = tuple[Tensor, Tensor, Tensor, Tensor]
# float32 means float32 on a GPU too.
torch.backends.cudnn.allow_tf32 = False


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def conv4(problem: Problem, device: str) -> nn.Sequential:
    """The network at the problem's weights; its batch norms know batch statistics only.

    Of batch-norm weights per step it has the first; :func:`norms` gives those of the others.
    """
    sizes, blocks, channels, size = problem.sizes, [], 1, problem.sizes.image_size
    for _ in range(STAGES):
        blocks.append(
            _named(
                conv=nn.Conv2d(channels, sizes.filters, 3, padding=1),
                norm=nn.BatchNorm2d(sizes.filters, track_running_stats=False),
                act=nn.LeakyReLU(0.01),
                pool=nn.MaxPool2d(2),
            )
        )
        channels, size = sizes.filters, size // 2
    model = _named(
        blocks=nn.Sequential(*blocks), flat=nn.Flatten(), head=nn.Linear(channels * size * size, sizes.ways)
    )
    model.to(device, torch.from_numpy(problem.weights["head.weight"]).dtype)
    start = norms({name: torch.from_numpy(value) for name, value in problem.weights.items()}, 0)
    start |= {name: torch.from_numpy(problem.weights[name]) for name in problem.adapting()}
    model.load_state_dict(start)
    return model


def leaves(problem: Problem, device: str) -> Named:
    """Everything that has a meta-gradient, by name: weights, and MAML++'s rates."""
    return {
        name: torch.from_numpy(value).to(device).clone().requires_grad_()
        for name, value in problem.weights.items()
    }


def norms(own: Named, step: int) -> Named:
    """Batch-norm weights of a step."""
    return {name: p[step] if p.dim() == 2 else p for name, p in own.items() if ".norm." in name}


def rate(problem: Problem, own: Named, tensor: int, step: int) -> Tensor | float:
    """The inner rate: a number in plain MAML, in MAML++ the learned one of the tensor and step."""
    return own["rates"][tensor, step] if "rates" in own else problem.sizes.rate


def tasks(problem: Problem, device: str) -> Task:
    """Support images and labels, target images and labels, each [tasks, ...]."""
    support_x, support_y, target_x, target_y = (torch.from_numpy(t).to(device) for t in problem.tasks)
    return support_x, support_y, target_x, target_y


def finished(loss: Tensor, own: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor | None]]:
    """Loss and ``.grad`` of every parameter, once the device is done."""
    if loss.is_cuda:
        torch.cuda.synchronize()
    return loss, {name: p.grad for name, p in own.items()}
